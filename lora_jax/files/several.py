"""Several adapters at one path: a stack's file or directory, and the runs of a sweep."""

from pathlib import Path

from lora_jax.core.errors import AdapterFileError
from lora_jax.files import native, peft, stack_index
from lora_jax.files.disk.atomic import read_directory
from lora_jax.files.disk.safetensors_file import headers
from lora_jax.files.disk.strict_json import parse_json

RESULTS = "results.json"  # of a sweep


def adapters_at(path: Path) -> dict[str, Path]:
    """Return the adapters at a path by their names, each with its own path.

    Those of a stack are in the order of their slots, those of a sweep from the best to the worst,
    without the runs that diverged. There is none at the path of a single adapter, or of something
    else.

    Raises:
      AdapterFileError: the file or the index of the stack is damaged, or the results of the sweep.
    """
    if path.is_file():
        if path.suffix != native.SUFFIX or not native.is_header(headers(path).metadata):
            return {}
        names = native.read_metadata(path).get("names", ())
        return {name: path / name for name in names}
    if not path.is_dir() or (path / peft.CONFIG).is_file():
        return {}
    index = stack_index.read(path)
    if index is not None:
        return {name: _in_directory(path, name) for name in index.names}
    return {name: path / name for name in _runs(path)}


def _in_directory(path: Path, name: str) -> Path:
    own = path / name
    return own if own.is_dir() else own.with_name(f"{name}{native.SUFFIX}")


def _runs(path: Path) -> list[str]:
    """Return the names of the runs of a sweep that left an adapter."""
    found = read_directory(path, [RESULTS])
    if RESULTS not in found:
        return []
    source = path / RESULTS
    value = parse_json(found[RESULTS], str(source))
    runs = value.get("runs") if isinstance(value, dict) else None
    if not isinstance(runs, list) or "best" not in value:
        return []  # of something else
    names = [one.get("name") for one in runs if isinstance(one, dict) and one.get("adapter")]
    if problems := stack_index.name_problems(names):
        raise AdapterFileError(f"{source}: " + "; ".join(problems))
    return [str(name) for name in names]
