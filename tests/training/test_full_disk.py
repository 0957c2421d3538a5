"""A disk that is full: one line, no debris, and nothing that other libraries print."""

import errno
import os
import resource
import sys
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from lora_jax.cli import boundary
from lora_jax.files.disk.atomic import write_atomically, write_directory
from lora_jax.training import log
from lora_jax.training.checkpoints import Checkpoints
from lora_jax.training.errors import TrainingError
from lora_jax.training.loop import train
from tests.training import tiny_model


@pytest.fixture
def limited():
    """Let no file grow beyond a few bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size=64):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [64, 3000])  # other parts of Orbax fail first
def test_a_checkpoint_that_does_not_fit(size, tmp_path, limited, monkeypatch, capfd, caplog):
    """The older checkpoint stays, the unfinished one is gone, and stderr is empty."""
    state = {"x": jnp.arange(3.0), "y": {"z": jax.random.normal(jax.random.key(0), (99, 99))}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        monkeypatch.setattr(checkpoints, "reserve", lambda state: None)  # as if it filled up later
        limited(size)
        with pytest.raises(TrainingError) as error:
            checkpoints.save(2, state)
    message = (
        f"{tmp_path}: cannot write the checkpoint of step 2 (the disk is full). Free some disk"
    )
    assert str(error.value).startswith(message) and "--resume" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert capfd.readouterr().err == "" and caplog.messages == []


def test_writes_that_end_after_the_first_has_failed_print_nothing(tmp_path, monkeypatch, capfd):
    """As tensorstore's do on a full disk: their callbacks find Orbax's event loop closed."""

    class Write:
        def __del__(self):
            raise RuntimeError("Event loop is closed")

    def fails(*args, **options):
        Write()
        threading.Timer(0.05, Write).start()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)  # not pytest's, which raises
    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", fails)
        with pytest.raises(TrainingError, match="the disk is full"):
            checkpoints.save(1, {"x": jnp.arange(3.0)})
        time.sleep(0.1)
        assert capfd.readouterr().err == ""
        Write()
        assert "Event loop is closed" in capfd.readouterr().err  # other ones are seen again


def test_the_space_is_checked_before_the_first_step(tmp_path, monkeypatch):
    def full(handle, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    job, start = tiny_model.job(tmp_path, steps=2)
    with pytest.raises(
        TrainingError, match=r"cannot write a checkpoint of .* \(the disk is full\)"
    ):
        train(job, start)
    assert log.read(tmp_path / "log.jsonl") == []


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_atomically(path, b"x" * 1000),
        lambda path: write_directory(path, {"a": b"x" * 1000}),
        lambda path: log.append(path, {"step": 1, "words": "x" * 1000}),
    ],
)
def test_the_message_names_the_path(write, tmp_path, limited):
    limited()
    with pytest.raises(OSError) as error:
        write(tmp_path / "file")
    assert error.value.filename == str(tmp_path / "file")
    assert boundary.explain(error.value)[0].startswith(f"{tmp_path / 'file'}: ")


def test_a_full_disk_is_not_called_memory():
    words = "RESOURCE_EXHAUSTED: Error writing file: No space left on device"
    assert boundary.explain(ValueError(words))[0].startswith("the disk is full")
    assert boundary.explain(ValueError("RESOURCE_EXHAUSTED"))[0].startswith("out of memory")
