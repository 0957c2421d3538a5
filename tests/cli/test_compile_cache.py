"""Programs that are compiled once: kept on the disk, and loaded by the next run."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("typer")

from lora_jax.cli import compile_cache
from lora_jax.training import log
from tests.cli.train.command import words

HIT, MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"


@pytest.fixture
def events():
    """Return what JAX's cache does, in order."""
    found = []
    jax.monitoring.register_event_listener(lambda name, **_: found.append(name))
    yield found
    jax.monitoring.clear_event_listeners()


def compiled(x):
    """Compile the same program as before, anew, and return its value."""
    return float(jax.jit(lambda x: jnp.sin(x) * 31 + x)(x))


def count(events, name):
    found = events.count(name)
    events.clear()
    return found


def test_a_program_is_loaded_that_was_compiled_before(tmp_path, events, capfd, recwarn):
    x = jnp.float32(0.5)
    expected = compiled(x)
    assert count(events, HIT) == 0
    options = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    before = [getattr(jax.config, name) for name in options]
    with compile_cache.compile_cache(str(tmp_path / "programs")):
        assert compiled(x) == expected and count(events, MISS) == 1
    with compile_cache.compile_cache(str(tmp_path / "programs")):
        assert compiled(x) == expected and count(events, HIT) == 1
    assert [getattr(jax.config, name) for name in options] == before
    compiled(x)
    assert count(events, HIT) == 0  # as before the block

    for file in (tmp_path / "programs").iterdir():  # as another process may have written so far
        file.write_bytes(file.read_bytes()[:100])
    with compile_cache.compile_cache(str(tmp_path / "programs")):
        assert compiled(x) == expected
    with compile_cache.compile_cache("none"):
        compiled(x)
        assert count(events, HIT) == 0
    assert capfd.readouterr().err == "" and not recwarn.list


def test_a_directory_that_cannot_be_written(tmp_path, capfd):
    (tmp_path / "file").touch()
    with compile_cache.compile_cache(str(tmp_path / "file" / "programs")):
        assert compiled(jnp.float32(0.5))
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"note: compiled programs are not kept: {tmp_path / 'file'}")
    assert said.endswith("choose another --compile-cache, or none\n")


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"LORA_JAX_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a/compiled"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/lora_jax/compiled"),
        ({}, "/home/me/.cache/lora_jax/compiled"),
    ],
)
def test_the_default_directory(given, expected, monkeypatch):
    for name in ("LORA_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **given}.items():
        monkeypatch.setenv(name, value)
    assert str(compile_cache.default_directory()) == expected


def test_the_oldest_programs_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "LIMIT", 25)
    (tmp_path / "compiled").mkdir()
    for name, time in (("old", 100), ("new", 300), ("middle", 200)):
        path = tmp_path / "compiled" / name
        path.write_bytes(b"x" * 10)
        os.utime(path, (time, time))
    compile_cache.shrink(tmp_path / "compiled")
    assert sorted(path.name for path in (tmp_path / "compiled").iterdir()) == ["middle", "new"]


@pytest.mark.slow
def test_two_processes_fill_one_directory_and_the_next_run_is_faster(play, tmp_path):
    """Each run of the command is a process of its own; all losses are the same."""
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}

    def start(name):
        command = words(play, tmp_path / name, "--steps", 2, "--length", 512, "--compile-cache")
        command = [sys.executable, "-m", "lora_jax.cli", *command, str(tmp_path / "programs")]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)

    def end(name, process):
        said = process.communicate()[1]
        assert process.returncode == 0 and "warning" not in said, said
        return log.read(tmp_path / name / "log.jsonl")

    first = [(name, start(name)) for name in ("one", "two")]
    cold, other = (end(*pair) for pair in first)
    warm = end("three", start("three"))
    assert [r["loss"] for r in cold] == [r["loss"] for r in other] == [r["loss"] for r in warm]
    assert warm[0]["seconds"] < 0.6 * min(cold[0]["seconds"], other[0]["seconds"])
