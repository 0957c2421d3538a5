"""Data files that are compressed, told by their names: `.gz` and `.zst`."""

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path

from lora_jax.core.foreign import shown
from lora_jax.training.errors import DataError


def _gunzip(path: Path) -> bytes:
    with gzip.open(path) as file:
        return file.read()


def _unzstd(path: Path) -> bytes:
    try:
        import pyarrow
    except ImportError:
        raise DataError(
            f"{path}: reading .zst needs the package pyarrow; pip install 'lora-jax[parquet]', or "
            "compress the file with gzip"
        ) from None
    with pyarrow.input_stream(str(path), compression="zstd") as file:
        return file.read()


#: The suffix of a compressed file -> what reads it.
READERS: dict[str, Callable[[Path], bytes]] = {".gz": _gunzip, ".zst": _unzstd}


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
    compression = suffixes(path)[1]
    try:
        return READERS[compression](path) if compression else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: is not a whole {compression} file ({shown(error)})") from None
    except OSError as error:
        if compression and error.errno is None:  # pyarrow's
            said = shown(" ".join(str(error).split()))
            raise DataError(f"{path}: is not a whole {compression} file ({said})") from None
        raise DataError(f"cannot read {path}: {error.strerror}") from None
