"""Read and write checkpoints of parameters with Orbax, which only this file imports."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax.core.checks import is_within
from lora_jax.core.errors import AdapterFileError
from lora_jax.core.foreign import shown
from lora_jax.files.disk import strict_json
from lora_jax.files.disk.quiet_orbax import quiet_orbax
from lora_jax.files.orbax.formats import format_of
from lora_jax.files.orbax.from_tree import from_tree
from lora_jax.files.orbax.nested import wrapper_of
from lora_jax.files.orbax.to_tree import to_tree

#: The item of a step that has the parameters, in the order of preference.
_ITEMS = ("params", "model_params", "model", "items", "default", "state", "train_state")
_STEP_METADATA = "_CHECKPOINT_METADATA"
_METADATA = ("_METADATA", "_sharding", "manifest.ocdbt")  # of an item


def load(
    path: str | os.PathLike,
    format: str,
    *,
    base: Any = None,
    alpha: float | None = None,
    rslora: bool = False,
) -> Any:
    """Read an Orbax checkpoint, its LoRA factors as adapters beside their weights.

    Args:
      path: the directory of the parameters, of a step, or of all steps, of which the last is read.
        Optimizer states beside the parameters are not read.
      format, base, alpha, rslora: as for `from_tree`. MaxText keeps alpha in the metadata of a
        step: there it may be left out.

    Returns:
      The parameters, see `from_tree`; arrays are on the default device, or NumPy's.

    Raises:
      AdapterFileError: there is none, it is damaged, or its factors do not fit.
      ConfigError: as `from_tree`.
    """
    item = _item(Path(path).absolute())
    if alpha is None and format_of(format).scale == "alpha":
        alpha = _alpha_in_metadata(item)
    tree = _restore(item)
    return from_tree(tree, format, base=base, alpha=alpha, rslora=rslora, source=str(item))


def save(
    path: str | os.PathLike, adapters: Any, format: str, *, alpha: float | None = None
) -> None:
    """Write adapters as a trainer's Orbax checkpoint; the directory must not exist.

    Args:
      path: the directory.
      adapters, format, alpha: as for `to_tree`.

    Raises:
      StructureError, ConfigError: as `to_tree`.
      FileExistsError: something is there already.
    """
    import orbax.checkpoint as ocp

    if Path(path).exists():
        raise FileExistsError(f"{path}: exists already; give another directory")
    tree, wrapper = to_tree(adapters, format, alpha=alpha), format_of(format).wrapper
    tree = {wrapper: tree} if wrapper else tree
    with quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(path).absolute(), tree)


def _item(path: Path) -> Path:
    """Return the directory of the parameters in a checkpoint.

    Raises:
      AdapterFileError: there is none.
    """
    for _ in range(3):  # steps, a step, an item
        if any((path / name).exists() for name in _METADATA):
            return path
        names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
        steps = sorted((int(name), name) for name in names if name.isdecimal())
        items = [name for name in _ITEMS if name in names]
        if not steps and not items:
            break
        path = path / (steps[-1][1] if steps else items[0])
    raise AdapterFileError(f"{path}: not an Orbax checkpoint: it has no {_METADATA[0]}")


def _alpha_in_metadata(item: Path) -> float | None:
    """Return the alpha that MaxText keeps beside a step's items, or None where there is none."""
    for place in (item, item.parent):
        file = place / _STEP_METADATA
        if not file.is_file():
            continue
        values = strict_json.parse_json(file.read_bytes(), str(file))
        for name in ("custom_metadata", "lora", "lora_alpha"):
            values = values.get(name) if isinstance(values, dict) else None
        if is_within(values, 1e-30, 1e30):  # 0 is MaxText's default, which says nothing
            return float(values)
    return None


def _restore(item: Path) -> Any:
    """Return the parameters of an item, as nested dictionaries of NumPy arrays."""
    import orbax.checkpoint as ocp

    try:
        with quiet_orbax(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            shapes = checkpointer.metadata(item).item_metadata
            wanted = _parameters(dict(shapes.tree))
            numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            blank = jax.tree.map(lambda _: 0, wanted)
            return checkpointer.restore(
                item, args=ocp.args.PyTreeRestore(blank, restore_args=numpy, partial_restore=True)
            )
    except Exception as error:  # whatever Orbax meets in a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise AdapterFileError(f"{item}: cannot be read ({shown(reason)})") from error


def _parameters(tree: Any) -> Any:
    """Return the part of a training state that holds the parameters, in its place."""
    name = wrapper_of(tree)
    return tree if name is None else {name: _parameters(tree[name])}
