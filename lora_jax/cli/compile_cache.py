"""Compiled programs on the disk, which the next run of the same command loads instead."""

import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from lora_jax.cli.parameters.groups import in_devices

OFF = "none"
LIMIT = 8 << 30  # bytes of the default directory, from which the oldest programs are deleted

CompileCacheOption = Annotated[
    str | None,
    in_devices(
        metavar="DIR",
        help="Directory of compiled programs, or none; default: compiled/ in the user's cache.",
    ),
]


def default_directory() -> Path:
    """Return `compiled` in `$LORA_JAX_CACHE`, or else in `lora_jax` in the user's cache."""
    chosen, caches = (os.environ.get(name) for name in ("LORA_JAX_CACHE", "XDG_CACHE_HOME"))
    if chosen:
        return Path(chosen).expanduser() / "compiled"
    return (Path(caches) if caches else Path.home() / ".cache") / "lora_jax" / "compiled"


@contextmanager
def compile_cache(chosen: str | None) -> Iterator[None]:
    """Let JAX keep the programs that it compiles within the block, and load those that it has kept.

    Where the directory cannot be written, a line on stderr says so and nothing is kept. Several
    processes may use one directory: an entry that another one is writing is compiled instead.

    Args:
      chosen: a directory; "none" for no cache; with None the `default_directory`, unless JAX's own
        settings name a directory or turn its cache off.
    """
    import jax  # not for --help

    directory, is_enabled = (
        getattr(jax.config, name)
        for name in ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    )
    if chosen is None and (directory or not is_enabled):
        yield
        return
    directory = default_directory() if chosen is None else Path(chosen).expanduser()
    is_kept = chosen != OFF and _is_writable(directory)
    if is_kept and chosen is None:
        shrink(directory)
    values: dict[str, Any] = {"jax_enable_compilation_cache": is_kept}
    if is_kept:
        values |= {
            "jax_compilation_cache_dir": str(directory.absolute()),
            "jax_persistent_cache_min_compile_time_secs": 0.0,
        }
    with configured(values), warnings.catch_warnings():
        # an entry that cannot be read or written costs the time of compiling, and nothing else
        said = "Error (reading|writing) persistent compilation cache"
        warnings.filterwarnings("ignore", message=said)
        yield


@contextmanager
def configured(values: dict[str, Any]) -> Iterator[None]:
    """Set JAX's options in a block."""
    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    before = {name: getattr(jax.config, name) for name in values}
    try:
        for name, value in values.items():
            jax.config.update(name, value)
        reset_cache()  # JAX looks at its options once
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()


def _is_writable(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError as error:
        print(
            f"note: compiled programs are not kept: {directory}: {error.strerror}; choose another "
            f"--compile-cache, or {OFF}",
            file=sys.stderr,
        )
        return False


def shrink(directory: Path) -> None:
    """Delete the programs that were not used for longest, until the others fit into `LIMIT`."""
    entries = []
    for path in directory.glob("*"):
        with suppress(OSError):  # another process has deleted it
            found = path.stat()
            entries.append((max(found.st_atime, found.st_mtime), found.st_size, path))
    kept = 0
    for _, size, path in sorted(entries, reverse=True):
        kept += size
        if kept > LIMIT:
            with suppress(OSError):
                path.unlink()
