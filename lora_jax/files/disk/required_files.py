"""The files of an adapter's directory, all of which must be there."""

import os
from collections.abc import Sequence
from pathlib import Path

from lora_jax.core.errors import AdapterFileError
from lora_jax.files.disk.atomic import read_directory


def read_required(
    directory: str | os.PathLike, names: Sequence[str], *, pickled: str | None = None
) -> dict[str, bytes]:
    """Return the content of the named files, as `read_directory` does.

    Args:
      directory: where the files are.
      names: the names of the files.
      pickled: the name of a pickle that may be there in their place, which is never read.

    Raises:
      AdapterFileError: a file is missing or cannot be read.
    """
    try:
        files = read_directory(directory, names)
    except OSError as error:
        raise AdapterFileError(f"{directory}: cannot be read: {error.strerror}") from None
    for name in names:
        if name not in files:
            is_pickled = pickled is not None and (Path(directory) / pickled).exists()
            why = f"; {pickled} is a pickle, which is never read" if is_pickled else ""
            raise AdapterFileError(f"{Path(directory) / name}: no such file{why}")
    return files
