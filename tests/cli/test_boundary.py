"""Every failure is one line on stderr and an exit status; help and version import nothing heavy."""

import errno
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import tomllib
import warnings

import pytest
import typer

import lora_jax
from lora_jax.cli import app, boundary, exit_status, main
from lora_jax.models.assets import AssetError
from tests.cli import files

ROOT = pathlib.Path(__file__).parents[2]
HEAVY = {"flax", "gguf", "jax", "jinja2", "matplotlib", "numpy", "optax", "orbax", "tokenizers"}


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


FAILURES = {
    "ours": (lora_jax.StructureError("it does not fit:\n  q\n  k"), 1, "it does not fit: q; k"),
    "asset": (AssetError("no network"), 1, "no network"),
    "missing": (FileNotFoundError(errno.ENOENT, "x", "a.txt"), 1, "a.txt: no such file"),
    "full": (OSError(errno.ENOSPC, "No space", "b.bin"), 1, "b.bin: the disk is full; free some"),
    "denied": (PermissionError(errno.EACCES, "x", "/c"), 1, "/c: permission denied; choose"),
    "directory": (IsADirectoryError(errno.EISDIR, "x", "d"), 1, "d: is a directory, but a file"),
    "other": (OSError(errno.EIO, "Input/output error", "e"), 1, "e: Input/output error"),
    "no errno": (OSError("odd"), 1, "odd"),
    "memory": (MemoryError(), 1, "out of memory; use a smaller batch"),
    "text": (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), 1, "not UTF-8 text"),
    "extra": (ModuleNotFoundError("x", name="gguf.quants"), 1, 'pip install "lora-jax[cli]"'),
    "interrupted": (KeyboardInterrupt(), 130, "interrupted\n"),
    "saved": (KeyboardInterrupt("saved to x"), 130, "interrupted: saved to x"),
    "defect": (KeyError("x"), 1, "unexpected KeyError: 'x'; this is a bug in lora-jax"),
    "usage": (typer.BadParameter("too small"), 2, "too small; 'lora-jax --help' shows"),
}


@pytest.fixture
def failing(monkeypatch):
    """Make the command line fail with an exception where a command would run."""

    def fail(error):
        def _run(words):
            raise error

        monkeypatch.setattr(boundary, "_run", _run)

    return fail


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_one_line_and_a_status(name, failing, capsys):
    error, status, line = FAILURES[name]
    failing(error)
    assert main([]) == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert line in err


def test_a_sweep_that_needs_too_much_memory():
    line, _ = boundary.explain(MemoryError(), ["sweep", "--model", "tiny"])
    assert line.startswith("out of memory; use fewer --slots, a smaller batch")


def test_a_long_list_is_cut():
    line, _ = boundary.explain(lora_jax.LoraError("\n".join(["missing:", *map(str, range(90))])))
    assert line.startswith("missing: 0; 1; ") and line.endswith(
        "and 79 more (LORA_JAX_DEBUG=1 shows all)"
    )


def test_a_json_error_says_so():
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads("{")
    assert boundary.explain(caught.value)[0].startswith("not valid JSON: ")


def test_the_traceback_on_request(failing, capsys, monkeypatch):
    monkeypatch.setenv("LORA_JAX_DEBUG", "1")
    failing(lora_jax.LoraError("no"))
    assert main([]) == 1
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err and err.endswith("error: no\n")


def test_a_warning_is_one_line(monkeypatch, capsys):
    def _run(words):
        warnings.warn("made dense\nat x.py:3", lora_jax.DenseWarning, stacklevel=1)
        return 0

    monkeypatch.setattr(boundary, "_run", _run)
    with warnings.catch_warnings(action="always"):  # the suite makes errors of warnings
        assert main([]) == 0
    assert capsys.readouterr().err == "warning: made dense; at x.py:3\n"


def test_version_and_bare_help(run):
    assert run("--version").out == f"lora-jax {lora_jax.__version__}\n"
    assert run().out == run("--help").out and run("--help").status == 0


@pytest.mark.parametrize("command", ["", *app.COMMANDS])
@pytest.mark.parametrize("columns", [30, 50, 80, 200])
def test_help_holds_whole_examples_in_any_terminal(command, columns, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    done = run(*command.split(), "--help")
    assert (done.status, done.err) == (0, "")
    examples = {example for module in app.COMMANDS.values() for example in module.EXAMPLES[:1]}
    if command:
        examples = set(app.COMMANDS[command].EXAMPLES)
    lines = [line.strip() for line in done.out.splitlines()]
    assert examples and examples <= set(lines)
    rest = [line for line in done.out.splitlines() if line.strip() not in examples]
    assert columns < 80 or max(map(len, rest)) <= columns
    assert "\x1b" not in done.out


def test_help_says_the_exit_codes(run):
    out = run("--help").out
    for status in (boundary.OK, boundary.FAILED, exit_status.USAGE, boundary.INTERRUPTED):
        assert f"  {status} " in out
    assert f"  {boundary.PIPE_CLOSED} " in out and boundary.DEBUG in out


def test_help_loads_nothing_heavy():
    done = python(
        """
        import sys
        from lora_jax.cli import main
        from lora_jax.cli.app import COMMANDS
        for words in (["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)):
            assert main(words) == 0
        print(*{name.split(".")[0] for name in sys.modules})
        """
    )
    assert done.returncode == 0, done.stderr
    assert HEAVY & set(done.stdout.splitlines()[-1].split()) == set()


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_a_missing_package_is_named_with_its_extra(package, tmp_path):
    files.peft(tmp_path / "adapter")
    done = python(
        f"""
        import sys
        sys.modules["{package}"] = None  # as if it were not installed
        from lora_jax.cli import main
        sys.exit(main(["inspect", {str(tmp_path / "adapter")!r}]))
        """
    )
    wanted = f'the package {package}, which is not installed: pip install "lora-jax[cli]"\n'
    assert done.returncode == 1 and done.stderr == "error: this needs " + wanted


def test_the_console_script_ends_with_the_status_of_main(monkeypatch):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    module, _, function = project["scripts"]["lora-jax"].partition(":")
    monkeypatch.setattr(sys, "argv", ["lora-jax", "nothing-like-it"])
    with pytest.raises(SystemExit) as ended:
        getattr(importlib.import_module(module), function)()
    assert ended.value.code == main(["nothing-like-it"]) == 2
    assert {"typer", "gguf", "jinja2"} <= set(project["optional-dependencies"]["cli"])


@pytest.mark.parametrize(
    "module", ["lora_jax", pytest.param("lora_jax.cli", marks=pytest.mark.slow)]
)
def test_the_module_runs(module, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", module, "inspect", tmp_path / "none"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"error: {tmp_path}/none: no such file or directory\n"


def test_a_closed_pipe_is_no_failure():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "lora_jax.cli", "--help"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (boundary.PIPE_CLOSED, "")


def test_what_a_message_quotes_does_not_steer_the_terminal(failing, capsys):
    for error in (KeyError("q\x1b[2J\x07\u202e"), OSError(errno.EIO, "x\x1b", "d\x1b\ud800")):
        failing(error)
        assert main([]) == 1
        err = capsys.readouterr().err
        assert err[:-1].isprintable() and "\\x1b" in err and err.endswith("\n")
    failing(lora_jax.LoraError("y" * 200_000))
    assert main([]) == 1 and len(capsys.readouterr().err) < 25_000


IN_C = """
import hashlib, signal, sys
from lora_jax.cli import boundary, main

def _run(words):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 2**31 - 1)  # as long as a compilation, in C

boundary._run = _run
signal.signal(signal.SIGINT, getattr(signal, sys.argv[1]))
sys.argv[1:] = ["generate"]
sys.exit(main())
"""


@pytest.mark.parametrize("handler", ["default_int_handler", "SIG_IGN"])
def test_ctrl_c_ends_the_process_at_once(handler):
    """Also where Python cannot raise an exception; a shell's background job stays."""
    with subprocess.Popen(
        [sys.executable, "-c", IN_C, handler],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        if handler == "SIG_IGN":
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.3)
            process.kill()
        else:
            assert process.wait(30) == boundary.INTERRUPTED
            assert process.stderr.read() == "error: interrupted\n"
