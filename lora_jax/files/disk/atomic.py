"""Write files completely or not at all, even if the writer is killed."""

import contextlib
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

if sys.platform != "win32":  # which has no such locks: nothing stale is removed there
    import fcntl

#: A file's bytes, or a function that writes them to an open file, for what exceeds the memory.
Content = bytes | Callable[[BinaryIO], None]
#: Holds a set of files from the moment it is complete until each file is in its place.
COMMIT = ".lora_jax-commit"
_STALE = re.compile(r"\.lora_jax-[0-9a-f]{16}\.tmp")
#: Seconds to wait for another process that writes to the same directory.
PATIENCE = 30.0


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Write a file so that, whatever happens, either the old or the new one is there, complete.

    The bytes are written to a temporary file beside it, flushed to the disk, and renamed into
    place. A temporary file left by a killed process is removed by the next process that writes to
    the directory; a lock ensures that its writer is dead. Symbolic links are followed.

    Args:
      path: the file; its directory is created if missing.
      data: the complete content.

    Raises:
      OSError: the disk is full, the directory is not writable, ...; the old file is kept.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomically(f"{folder}/notes/a.txt", b"whole")
    ...     Path(f"{folder}/notes/a.txt").read_bytes(), os.listdir(f"{folder}/notes")
    (b'whole', ['a.txt'])
    """
    path = Path(os.path.realpath(path))
    with naming_path(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent)
        with _lock(path.parent, exclusive=False):
            _replace(path, data)
            _sync(path.parent)


def write_directory(path: str | os.PathLike, files: Mapping[str, Content]) -> None:
    """Write a set of files that belong together: all of the old ones or all of the new ones.

    This holds even if the process is killed at any time:

    1. A directory that does not exist is written completely under another name, then renamed.
    2. In an existing directory, other files are never touched. If a single file of the set differs
       from what is there, one rename replaces it (a training run that saves again, where the
       configuration stays the same).
    3. If more files differ, the new ones are written to a directory inside it, which is renamed to
       `.lora_jax-commit` once they are all on the disk. Then the *first* file of the set is
       removed, the others are renamed into place, and the first one comes last. So nobody ever sees
       a mixture: a reader that does not know this scheme finds the old set, the new set, or the
       first file missing. `read_directory` looks for missing files in `.lora_jax-commit`, so it
       always finds a complete set, and the next `write_directory` finishes an interrupted one.

    Args:
      path: the directory; created if missing.
      files: content by file name: bytes, or a function that writes them to an open file. If one of
        these raises an error, nothing is changed. The first file should be the one without which no
        reader considers the others valid.

    Raises:
      ValueError: a name is not a plain file name.
      OSError: the disk is full, another process writes there for more than half a minute, ...

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_directory(f"{folder}/adapter", {"config": b"{}", "weights": b"old"})
    ...     write_directory(f"{folder}/adapter", {"config": b"{}", "weights": b"new"})
    ...     read_directory(f"{folder}/adapter", ["config", "weights", "notes"])
    {'config': b'{}', 'weights': b'new'}
    """
    path = Path(os.path.realpath(path))
    for name in files:
        _check_name(name)
    with naming_path(path):
        _write_directory(path, files)


def _write_directory(path: Path, files: Mapping[str, Content]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        _remove_stale(path.parent)
        with _lock(path.parent, exclusive=False):
            staged = _stage(path.parent, files)
            try:
                os.rename(staged, path)
            except OSError:  # someone else made it meanwhile
                shutil.rmtree(staged)
                if not path.is_dir():
                    raise
            else:
                _sync(path.parent)
                return
    with _lock(path, exclusive=True) as locked:
        if locked:
            _sweep(path)
        _complete(path)
        _replace_set(path, files)
        _sync(path)


@contextlib.contextmanager
def naming_path(path: Path) -> Iterator[None]:
    """Give an `OSError` within the block a file name where it has none: writing has none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def read_directory(path: str | os.PathLike, names: Sequence[str]) -> dict[str, bytes]:
    """Read a set of files, as of one `write_directory`: all old ones or all new ones.

    Nothing is written. Missing files are left out of the result.

    Args:
      path: the directory.
      names: the names of the files.
    """
    path = Path(path)
    with _lock(path, exclusive=False):
        staged = _unfinished(path)
        found = {name: path / COMMIT / name if name in staged else path / name for name in names}
        return {name: file.read_bytes() for name, file in found.items() if file.is_file()}


def _replace(path: Path, data: Content) -> None:
    """Write a file beside `path`, and rename it into place."""
    temporary = path.with_name(_temporary_name())
    try:
        _write(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _replace_set(path: Path, files: Mapping[str, Content]) -> None:
    """Do step 3 of `write_directory`, or step 2 if it suffices."""
    new = {name: data for name, data in files.items() if not _holds(path / name, data)}
    if len(new) == 1:
        for name, data in new.items():
            _replace(path / name, data)
    elif new:
        first = next(iter(files))  # without which the others are not valid, changed or not
        new = {first: files[first], **new}
        os.rename(_stage(path, new), path / COMMIT)
        _sync(path)
        others = [name for name in new if name != first]
        (path / first).unlink(missing_ok=True)
        _move_into_place(path, [*others, first])


def _move_into_place(path: Path, names: Sequence[str]) -> None:
    for name in names:
        os.replace(path / COMMIT / name, path / name)
    _sync(path)
    shutil.rmtree(path / COMMIT)


def _unfinished(path: Path) -> list[str]:
    """List the files of a set that is complete but not yet in place, which supersede the others."""
    commit = path / COMMIT
    if commit.is_symlink() or not commit.is_dir():
        return []
    names = sorted(file.name for file in commit.iterdir() if file.is_file())
    # If none is missing, the first was not removed yet, or someone has written the set since.
    return names if any(not (path / name).exists() for name in names) else []


def _complete(path: Path) -> None:
    """Finish or undo what a killed `write_directory` started."""
    commit = path / COMMIT
    if commit.is_symlink():
        commit.unlink()
    elif commit.is_dir():
        # The missing file comes last, as it would have.
        names = sorted(_unfinished(path), key=lambda name: not (path / name).exists())
        _move_into_place(path, names)


def _stage(parent: Path, files: Mapping[str, Content]) -> Path:
    """Write the files to a new directory, flushed to the disk."""
    staged = parent / _temporary_name()
    try:
        staged.mkdir()
        for name, data in files.items():
            _write(staged / name, data)
        _sync(staged)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return staged


def _write(path: Path, data: Content) -> None:
    with path.open("xb") as file:
        if callable(data):
            data(file)
        else:
            file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _holds(path: Path, data: Content) -> bool:
    if callable(data):
        return False  # it would have to be made to be compared
    return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data


def _temporary_name() -> str:
    return f".lora_jax-{secrets.token_hex(8)}.tmp"


def _check_name(name: str) -> None:
    special = name in ("", ".", "..", COMMIT) or bool(_STALE.fullmatch(name))
    if special or re.search(r"[/\\\0:]", name):
        raise ValueError(f"{name!r} is not the name of a file within a directory")


def _remove_stale(directory: Path) -> None:
    """Remove what killed processes left, unless someone is writing there now."""
    with _lock(directory, exclusive=True, patience=0.0) as locked:
        if locked:
            _sweep(directory)


def _sweep(directory: Path) -> None:
    # Every writer holds the directory's lock while its temporary file exists, and we hold it alone.
    for name in filter(_STALE.fullmatch, os.listdir(directory)):
        stale = directory / name
        if stale.is_dir() and not stale.is_symlink():
            shutil.rmtree(stale, ignore_errors=True)
        else:
            stale.unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(directory: Path, exclusive: bool, patience: float | None = None) -> Iterator[bool]:
    """Hold the directory's lock, and yield whether it is held. It is released if we are killed.

    Readers proceed without it. A writer of sets (`exclusive`, with patience) gives up.
    """
    if sys.platform == "win32":
        yield False
        return
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        yield _acquire(handle, directory, exclusive, PATIENCE if patience is None else patience)
    finally:
        os.close(handle)


def _acquire(handle: int, directory: Path, exclusive: bool, patience: float) -> bool:
    mode = (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, mode)
            return True
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.005)
            elif exclusive and patience:
                message = f"{directory}: another process has been writing here for {patience:.0f} s"
                raise TimeoutError(message) from None
            else:
                return False
        except OSError:  # the file system has no locks
            return False


def _sync(directory: Path) -> None:
    """Flush renames to the disk; some systems cannot, and need not."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
