"""Files and sets of files are complete whatever happens, and other files are never touched."""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from lora_jax.files.disk import atomic
from lora_jax.files.disk.atomic import COMMIT, read_directory, write_atomically, write_directory

NAMES = ["config", "weights", "extra"]
OLD = {"config": b"old config", "weights": b"old weights", "extra": b"the same"}
NEW = {"config": b"new config", "weights": b"new weights!", "extra": b"the same"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Skip fsync: these tests never lose power."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Killed(BaseException):
    """Simulates kill -9 within one process: nothing is cleaned up after it."""


CALLS = ("rename", "replace", "unlink", "mkdir", "rmdir", "fsync", "open")


def killed_at(monkeypatch, step, write):
    """Run `write` up to its `step`-th system call; return whether it was killed."""
    count = 0

    def counted(name):
        real = getattr(os, name)

        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count > step:
                raise Killed
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, counted(name))
        try:
            write()
        except Killed:
            return True
    return False


def foreign(path):
    """Return what a reader sees that does not know about commits."""
    return {n: (path / n).read_bytes() for n in NAMES if (path / n).is_file()}


def test_killed_at_every_system_call_of_replacing_a_set(tmp_path, monkeypatch):
    mine = tmp_path / "mine.txt"
    seen, step = [], 0
    while True:
        path = tmp_path / f"{step}"
        write_directory(path, OLD)
        (path / "notes.txt").write_bytes(b"notes")
        (path / "deep").mkdir()
        (path / "deep" / "file").write_bytes(b"deep")
        mine.write_bytes(b"mine")
        killed = killed_at(monkeypatch, step, lambda path=path: write_directory(path, NEW))
        got, plain = read_directory(path, NAMES), foreign(path)
        assert got in (OLD, NEW), (step, got)
        if "config" in plain:
            assert plain in (OLD, NEW), (step, plain)
        assert (path / "notes.txt").read_bytes() == b"notes"
        assert (path / "deep" / "file").read_bytes() == b"deep" and mine.read_bytes() == b"mine"
        seen.append(got == NEW)
        step += 1
        if not killed:
            break
    assert step > 15 and seen == sorted(seen) and not seen[0] and seen[-1]
    assert sum(seen) > 3  # killed after the commit, too


def test_the_first_file_is_missing_in_between_even_where_it_stays_the_same(tmp_path, monkeypatch):
    old, new = ({"config": b"same", "weights": x, "card": x} for x in (b"old", b"new"))
    killed, missing, step = True, 0, 8  # before that nothing is moved
    while killed:
        path = tmp_path / f"{step}"
        write_directory(path, old)
        killed = killed_at(monkeypatch, step, lambda path=path: write_directory(path, new))
        plain = {name: (path / name).read_bytes() for name in new if (path / name).is_file()}
        assert read_directory(path, [*new]) in (old, new)
        assert "config" not in plain or plain in (old, new), (step, plain)
        missing, step = missing + ("config" not in plain), step + 1
    assert missing > 2


@pytest.mark.parametrize("again", [OLD, NEW, {"weights": b"third", "config": b"third"}])
def test_the_next_writer_clears_up(tmp_path, monkeypatch, again):
    for step in range(40):
        path = tmp_path / f"{step}"
        write_directory(path, OLD)
        killed_at(monkeypatch, step, lambda path=path: write_directory(path, NEW))
        write_directory(path, again)
        assert sorted(os.listdir(path)) == sorted(NAMES)
        assert foreign(path) == read_directory(path, NAMES) == {**NEW, **again}


def test_a_second_kill_while_the_first_is_completed(tmp_path, monkeypatch):
    third = {"config": b"3", "weights": b"33"}
    for step in range(8, 20):
        for second in range(0, 30, 3):
            path = tmp_path / f"{step}-{second}"
            write_directory(path, OLD)
            killed_at(monkeypatch, step, lambda path=path: write_directory(path, NEW))
            killed_at(monkeypatch, second, lambda path=path: write_directory(path, third))
            assert read_directory(path, NAMES) in (OLD, NEW, {**OLD, **third})


def test_killed_while_a_new_directory_is_written(tmp_path, monkeypatch):
    for step in range(30):
        parent = tmp_path / f"{step}"
        killed = killed_at(monkeypatch, step, lambda p=parent: write_directory(p / "a", NEW))
        assert foreign(parent / "a") in ({}, NEW)
        write_directory(parent / "b", OLD)
        assert sorted(os.listdir(parent)) in (["b"], ["a", "b"])
    assert not killed and foreign(parent / "a") == NEW


def test_killed_while_one_file_is_written(tmp_path, monkeypatch):
    for step in range(20):
        folder = tmp_path / f"{step}"
        write_atomically(folder / "a", b"old")
        killed = killed_at(monkeypatch, step, lambda f=folder: write_atomically(f / "a", b"newer"))
        assert (folder / "a").read_bytes() in (b"old", b"newer")
        assert len(os.listdir(folder)) <= 2
        write_atomically(folder / "b", b"next")
        assert sorted(os.listdir(folder)) == ["a", "b"]
    assert not killed


def test_a_set_that_differs_in_one_file_is_one_rename(tmp_path, monkeypatch):
    """So readers that do not know about commits also see the old or the new set."""
    for step in range(20):
        path = tmp_path / f"{step}"
        write_directory(path, OLD)
        new = {**OLD, "weights": b"trained further"}
        killed = killed_at(monkeypatch, step, lambda p=path, n=new: write_directory(p, n))
        assert foreign(path) in (OLD, new)
    assert not killed


def test_an_error_leaves_the_old_set_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_directory(path, OLD)

    def full(handle):
        raise OSError(errno.ENOSPC, "disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="disk full"):
            write_directory(path, NEW)
        with pytest.raises(OSError, match="disk full"):
            write_directory(tmp_path / "b", NEW)
        with pytest.raises(OSError, match="disk full"):
            write_atomically(tmp_path / "c", b"")
    assert foreign(path) == OLD and sorted(os.listdir(path)) == sorted(NAMES)
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "name",
    ["../a", "a/b", "/a", "", ".", "..", "a\0", "a\\b", COMMIT, ".lora_jax-" + "0" * 16 + ".tmp"],
)
def test_names_that_lead_elsewhere(tmp_path, name):
    with pytest.raises(ValueError, match="not the name of a file"):
        write_directory(tmp_path / "a", {"config": b"", name: b""})
    assert os.listdir(tmp_path) == []


def test_an_existing_empty_or_foreign_directory(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError):
        write_directory(tmp_path / "file", NEW)
    (tmp_path / "empty").mkdir()
    write_directory(tmp_path / "empty", NEW)
    assert foreign(tmp_path / "empty") == NEW
    assert read_directory(tmp_path / "none", NAMES) == {}


def test_links_are_followed(tmp_path):
    write_atomically(tmp_path / "real" / "a", b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "a")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "a").read_bytes() == b"new"
    (tmp_path / "folder").symlink_to(tmp_path / "real")
    write_directory(tmp_path / "folder", NEW)
    assert (tmp_path / "folder").is_symlink() and foreign(tmp_path / "real") == NEW


def test_a_commit_that_is_a_link_moves_nothing(tmp_path):
    """A link to another directory must not make us move files out of it."""
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "weights").write_bytes(b"private")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / COMMIT).symlink_to(tmp_path / "private")
    assert read_directory(tmp_path / "a", NAMES) == {}
    write_directory(tmp_path / "a", {"config": b"c", "extra": b"e"})
    assert read_directory(tmp_path / "a", NAMES) == {"config": b"c", "extra": b"e"}
    assert (tmp_path / "private" / "weights").read_bytes() == b"private"


def test_a_set_written_since_by_someone_else_counts(tmp_path, monkeypatch):
    step, path = 0, tmp_path / "a"
    while not (path / COMMIT).exists() or (path / "config").exists():
        write_directory(path, OLD)
        killed_at(monkeypatch, step, lambda: write_directory(path, NEW))
        step += 1
    for name in NAMES:
        (path / name).write_bytes(b"theirs")
    assert set(read_directory(path, NAMES).values()) == {b"theirs"}
    write_directory(path, {"extra": b"ours"})
    assert read_directory(path, NAMES) == {
        "config": b"theirs",
        "weights": b"theirs",
        "extra": b"ours",
    }
    assert sorted(os.listdir(path)) == sorted(NAMES)


def test_a_living_writers_file_is_not_cleared_up(tmp_path, monkeypatch):
    """Two threads write to one directory; the second starts while the first is halfway."""
    half, go_on = threading.Event(), threading.Event()
    real = os.replace

    def slow(source, target):
        if threading.current_thread() is first:
            half.set()
            assert go_on.wait(20)
        return real(source, target)

    monkeypatch.setattr(os, "replace", slow)
    first = threading.Thread(target=write_atomically, args=(tmp_path / "a", b"a"))
    first.start()
    assert half.wait(20)
    write_atomically(tmp_path / "b", b"b")
    go_on.set()
    first.join()
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_readers_and_two_writers_at_once(tmp_path):
    """Each call opens the lock again, so threads exclude one another as processes do."""
    write_directory(tmp_path / "a", dict.fromkeys(("config", "weights"), b"start"))

    def write_often(text):
        for i in range(20):
            write_directory(
                tmp_path / "a", {name: f"{text} {i}".encode() for name in ("config", "weights")}
            )

    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(write_often, text) for text in "xy"]
        reads = 0
        while reads < 5 or not all(writer.done() for writer in writers):
            values = read_directory(tmp_path / "a", ["config", "weights"]).values()
            assert len(values) == 2 and len(set(values)) == 1
            reads += 1
        assert [writer.result() for writer in writers] == [None, None]
    assert sorted(os.listdir(tmp_path / "a")) == ["config", "weights"]


def test_a_writer_that_never_ends(tmp_path, monkeypatch):
    write_directory(tmp_path / "a", OLD)
    monkeypatch.setattr(atomic, "PATIENCE", 0.1)
    with atomic._lock(tmp_path / "a", exclusive=True) as locked:
        assert locked
        with pytest.raises(TimeoutError, match="another process has been writing here"):
            write_directory(tmp_path / "a", NEW)
        assert read_directory(tmp_path / "a", NAMES) == OLD
