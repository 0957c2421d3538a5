"""`load`: adapters from native files, one or a stack of them, onto their base."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_jax.core.errors import AdapterFileError
from lora_jax.files import stack_index
from lora_jax.files.disk.required_files import read_required
from lora_jax.files.native.file import (
    NativeFile,
    decode,
    member_of,
    read_file,
    read_files,
)
from lora_jax.files.native.fit import fit, fit_all
from lora_jax.files.stack_index import StackIndex

SUFFIX = ".safetensors"


def load(
    path: str | os.PathLike,
    base: Any,
    *,
    fsdp: str | Sequence[str] | None = None,
    names: str | Sequence[str] | None = None,
) -> Any:
    """Load the adapters in a file as an overlay of `base`, as in `join(base, load(path, base))`.

    What was saved from a stack, in one file or in a directory, is loaded as a stack. So are, with
    `names`, adapters that were saved one by one in a directory.

    Args:
      path: a file or directory that `save` wrote; an adapter in it by "all.safetensors/law".
      base: the parameter tree that the adapters were trained on, or a joined tree, of which only
        the base is used. Concrete leaves must have the values that the file was saved with. A
        quantized leaf may have been floating there, or the other way round: unless its values are
        the same, a `BaseKindWarning` tells so.
      fsdp: the names of the mesh axes that shard weights only to save memory. On a mesh factors
        are sharded as their weights are, but not along these; None stands for `data`, `fsdp`, `dp`,
        `ddp`, `batch` and `replica`, see `shardings`.

      names: the adapters of a stack to load, in this order; one name alone gives that adapter, not
        a stack.

    Raises:
      AdapterFileError: the file is missing, damaged (NaN and infinite values count as damage), not
        lora_jax's, or made for another base. All differences are listed at once.
    """
    if member_of(path)[1] is not None and names is None:
        return fit(read_file(path), base, fsdp)
    files, index = _read_directory(Path(path), names) if os.path.isdir(path) else read_files(path)
    if index is None:
        if names is not None:
            raise AdapterFileError(f"{path}: one adapter, not a stack; leave names out")
        return fit(files[0], base, fsdp)
    by_name = dict(zip(index.names, files, strict=True))
    chosen = index.choose(str(path), names)
    overlays = fit_all([by_name[name] for name in chosen], base, fsdp)
    return overlays[0] if isinstance(names, str) else index.stack(path, overlays)


def _read_directory(
    path: Path, names: str | Sequence[str] | None
) -> tuple[list[NativeFile], StackIndex]:
    """Return the adapters in a directory that are asked for, and an index of these."""

    def name_of(entry: str) -> str | None:
        is_file = entry.endswith(SUFFIX) and (path / entry).is_file()
        return entry.removesuffix(SUFFIX) if is_file else None

    index = stack_index.read_or_list(path, names, name_of)
    chosen = tuple(dict.fromkeys(index.choose(str(path), names)))
    files = read_required(path, [name + SUFFIX for name in chosen])
    read = [decode(path / f"{name}{SUFFIX}", files[name + SUFFIX]) for name in chosen]
    return read, StackIndex(chosen, index.rank)
