"""The command line in this process: what it prints, and its exit status."""

import dataclasses

import pytest

pytest.importorskip("typer")

from lora_jax import models
from lora_jax.cli import main
from lora_jax.cli.compile_cache import configured
from lora_jax.models.text.byte_tokenizer import byte_tokenizer
from lora_jax.models.tiny import tiny
from tests.cli.train.command import TEXT


@dataclasses.dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str


@pytest.fixture(scope="package", autouse=True)
def long_compilations_once(tmp_path_factory):
    """A step that one command compiled for seconds is loaded by the commands of other tests."""
    values = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.3,
    }
    with configured(values):
        yield


@pytest.fixture(autouse=True)
def no_columns(monkeypatch):
    """Output goes to a pipe whose width nobody has set; workers of pytest-xdist inherit one."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def run(capfd):
    """`run("inspect", path)`: the command in this process."""

    def call(*words):
        capfd.readouterr()
        status = main([str(word) for word in words])
        return Done(status, *capfd.readouterr())

    return call


@pytest.fixture
def fails(run):
    """Return a function that runs a command that must fail, and returns its line on stderr."""

    def call(*words, status=1):
        done = run(*words)
        assert done.status == status, done
        assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
        assert "bug in lora-jax" not in done.err and "Traceback" not in done.err, done.err
        return done.err

    return call


@pytest.fixture(scope="session")
def play(tmp_path_factory):
    """Return a text file to train on."""
    path = tmp_path_factory.mktemp("data") / "play.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Return the tiny model as a directory, with its tokenizer."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = byte_tokenizer()
    models.save(directory, tiny(len(tokenizer)))
    for name, data in tokenizer.files().items():
        (directory / name).write_bytes(data)
    return directory
