"""What docs/serving.md shows runs: its commands by curl, its program with OpenAI's client."""

import pathlib
import re
import shlex
import shutil
import subprocess

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")

from tests.project.test_docs import SERVING, blocks
from tests.serving import live, small

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "serving.md"
# The names on the page, and those of the server here.
NAMES = {"http://127.0.0.1:8000": None, '"smollm2"': '"base"', '"play"': '"law"'}


@pytest.fixture(scope="module")
def shown():
    """Start a server, and return the page's blocks with its address and its names, by language."""
    small.rows().clear()
    with live.serving() as server:
        found = {}
        for block in blocks(PAGE):
            if block.before == SERVING:
                code = block.code
                for old, new in NAMES.items():
                    assert old in code
                    code = code.replace(old, new or server.url)
                found[block.language] = code
        yield found


def test_the_commands(shown):
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    answers = []
    for line in re.sub(r"\\\n\s*", "", shown["console"]).splitlines():
        words = shlex.split(line)
        assert words[0] == "curl"
        run = subprocess.run([*words, "-sS", "--fail-with-body"], capture_output=True, text=True)
        assert run.returncode == 0, run
        answers.append(run.stdout)
    assert '"id":"law"' in answers[0] and '"finish_reason":"length"' in answers[1]
    assert answers[2].startswith("data: {") and answers[2].endswith("data: [DONE]\n\n")


def test_the_program(shown, capsys):
    names = {}
    exec(compile(shown["python"], PAGE, "exec"), names)
    names["client"].close()
    printed = capsys.readouterr().out
    assert printed.startswith("['base', 'law', 'french']\n") and " 20\n" in printed
