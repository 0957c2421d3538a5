"""Data files that are compressed, told by their names: `.gz` and `.zst`."""

import gzip
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from lora_jax.core.foreign import shown
from lora_jax.training.errors import DataError


def _gunzip(path: Path) -> Any:
    return gzip.open(path)


def _unzstd(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise DataError(
            f"{path}: reading .zst needs the package pyarrow; pip install 'lora-jax[parquet]', or "
            "compress the file with gzip"
        ) from None
    return pyarrow.input_stream(str(path), compression="zstd")


#: The suffix of a compressed file -> what opens it.
READERS: dict[str, Callable[[Path], Any]] = {".gz": _gunzip, ".zst": _unzstd}


def suffixes(path: Path) -> tuple[str, str]:
    """Return the suffix that tells what is in a file, and that of its compression, or "".

    >>> suffixes(Path("a.jsonl.gz")), suffixes(Path("b.csv"))
    (('.jsonl', '.gz'), ('.csv', ''))
    """
    last = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), last) if last in READERS else (last, "")


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a file, decompressed.

    Raises:
      DataError: it cannot be read, or is not compressed as its name says.
    """
    with _opened(path) as file:
        return file.read()


def on_disk(path: Path) -> Path:
    """Return where the bytes of a file lie without compression: itself, or a copy of it.

    The copy is in the directory for temporary files, and deleted when the process ends; the file is
    never whole in memory.

    Raises:
      DataError: as `read_bytes`, or the copy cannot be written.
    """
    if not suffixes(path)[1]:
        return path
    try:
        there = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    return _copied(path, there.st_size, there.st_mtime_ns)


@cache
def _copied(path: Path, *_: int) -> Path:
    copy = Path(_copies().name) / f"{_copied.cache_info().misses}-{path.stem}"
    with _opened(path) as file:
        try:
            with copy.open("wb") as copied:
                while block := file.read(_BLOCK):
                    _write(copied, block, path)
        except BaseException:
            copy.unlink(missing_ok=True)
            raise
    return copy


def _write(file: BinaryIO, block: bytes, path: Path) -> None:
    try:
        file.write(block)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be decompressed into {tempfile.gettempdir()}: {error.strerror}; set "
            "TMPDIR to a directory with more space, or add --no-stream"
        ) from None


_BLOCK = 1 << 20


@cache
def _copies() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="lora-jax-")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a file for a block; errors as of `read_bytes`."""
    compression = suffixes(path)[1]
    try:
        with READERS[compression](path) if compression else path.open("rb") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: is not a whole {compression} file ({shown(error)})") from None
    except OSError as error:
        if compression and error.errno is None:  # pyarrow's
            said = shown(" ".join(str(error).split()))
            raise DataError(f"{path}: is not a whole {compression} file ({said})") from None
        raise DataError(f"cannot read {path}: {error.strerror}") from None
