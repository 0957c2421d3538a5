"""The examples in the help run, on small files with the names that they use."""

import io
import shlex
import shutil

import pytest

from lora_jax.cli import app
from tests.cli import files

pytestmark = pytest.mark.usefixtures("quick_compile")

TRAINING = ("train", "sweep")  # commands whose examples take long
#: Commands whose examples compile a model; their own tests run them by default.
SLOW = (*TRAINING, "generate", "chat", "eval")
ENDLESS = ("serve",)  # tested in test_serve.py


def shown_in_help(run, command):
    """Return the lines under "Examples:", parsed from what the terminal shows."""
    lines = iter(run(command, "--help").out.splitlines())
    assert any(line.strip() == "Examples:" for line in lines)
    found = []
    for line in lines:
        if not line.strip().startswith("lora-jax "):
            break
        found.append(line.strip())
    return found


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW))
        for x in app.COMMANDS
        if x not in ENDLESS
    ],
)
def test_the_examples_run(command, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (files.train_data if command in TRAINING else files.everything)(tmp_path)
    examples = shown_in_help(run, command)
    assert examples == list(app.COMMANDS[command].EXAMPLES)
    for example in examples:
        words = shlex.split(example)
        assert words[:2] == ["lora-jax", command]
        shutil.rmtree("run", ignore_errors=True)
        words, into = (words[:-2], words[-1]) if words[-2] == ">" else (words, None)
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
        done = run(*words[1:])
        assert done.status == 0 and "error" not in done.err, (example, done)
        assert done.out
        if into:
            (tmp_path / into).write_text(done.out)
        if "--out" in words:
            assert (tmp_path / words[words.index("--out") + 1]).exists()
