"""Which axes of a mesh shard the examples, and weights only to save memory (FSDP)."""

import dataclasses
import re
from collections.abc import Collection, Iterable
from typing import Any

import jax
from jax.sharding import NamedSharding

from lora_jax.core.errors import ConfigError
from lora_jax.core.paths import flatten_with_key_paths, path_str
from lora_jax.core.quantized.weight import is_quantized

#: The names of mesh axes that shard examples by convention, also as a part: "dcn_data".
CONVENTIONAL = frozenset({"batch", "data", "ddp", "dp", "fsdp", "replica"})


@dataclasses.dataclass(frozen=True)
class DataAxes:
    """The mesh axes that shard the examples of a batch.

    A weight that one of them shards is gathered where it is used, as in FSDP. Its factors are
    small, and are not sharded along that axis.

    Args:
      everywhere: the names of these axes; None stands for all with a conventional name.
      of_batch: more of them, which shard a batch. They may shard experts too, and factors keep
        that: only the in and out axes of a weight do without them.
    """

    everywhere: frozenset[str] | None = None
    of_batch: frozenset[str] = frozenset()

    def removed(self, entry: Any, is_batch: bool) -> Any:
        """Return an entry of a `PartitionSpec` without these axes.

        >>> DataAxes().removed(("fsdp", "tensor"), is_batch=False)
        'tensor'
        """
        names = entry if isinstance(entry, tuple) else (entry,)
        kept = [name for name in names if name is not None and not self._has(name, is_batch)]
        if len(kept) == len(names):
            return entry
        return None if not kept else kept[0] if len(kept) == 1 else tuple(kept)

    def _has(self, name: Any, is_batch: bool) -> bool:
        if name in self.of_batch and not is_batch:
            return True
        return is_conventional(name) if self.everywhere is None else name in self.everywhere


def is_conventional(name: Any) -> bool:
    """Return whether an axis with this name shards examples by convention.

    >>> [is_conventional(name) for name in ("fsdp", "dcn_data", "tensor", "update")]
    [True, True, False, False]
    """
    return isinstance(name, str) and bool(CONVENTIONAL & {*re.split(r"[_\-./]", name.lower())})


def data_axes(caller: str, fsdp: Any, weights: Iterable[Any], batch: Any = ()) -> DataAxes:
    """Return the axes that `fsdp` names, or by default those that shard a batch.

    Args:
      caller: the function whose argument `fsdp` is, for messages.
      fsdp: the name of a mesh axis, or a sequence of names; None for the default.
      weights: the leaves of the base.
      batch: `(args, kwargs)`, the other arguments of the function.

    Raises:
      ConfigError: `fsdp` names no axis of a mesh on which a weight lies; or it is None, and the
        arguments are sharded along axes that do not agree.
    """
    if fsdp is not None:
        names = as_names(caller, fsdp)
        _check_known(caller, names, weights)
        return DataAxes(names)
    return DataAxes(None, _axes_of_batch(caller, batch))


def as_names(caller: str, fsdp: Any) -> frozenset[str]:
    """Return the names of axes in the argument `fsdp`: one, or a sequence of them.

    Raises:
      ConfigError: it is something else.
    """
    names = (fsdp,) if isinstance(fsdp, str) else fsdp
    if not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"{caller}: fsdp must be the names of mesh axes, such as ('fsdp',), got {fsdp!r}"
        )
    return frozenset(names)


def _check_known(caller: str, names: Collection[str], weights: Iterable[Any]) -> None:
    meshes = [x.mesh for x in map(named_sharding, weights) if x is not None]
    known = dict.fromkeys(axis for mesh in meshes for axis in mesh.axis_names)
    unknown = [name for name in sorted(names) if name not in known]
    if unknown and known:
        raise ConfigError(
            f"{caller}: fsdp names {', '.join(map(repr, unknown))}, but the base lies on a mesh "
            f"with the axes {', '.join(map(repr, known))}"
        )


def _axes_of_batch(caller: str, batch: Any) -> frozenset[str]:
    """Return the axes that shard the first sharded axis of the arrays in `batch`."""
    entries = {path: _first_entry(x) for path, x in flatten_with_key_paths(batch)}
    found = {path: axes for path, axes in entries.items() if axes}
    together = frozenset[str]().union(*found.values())
    if together in found.values():
        return together
    known = frozenset(filter(is_conventional, together))
    if known or not together:
        return known
    shown = {axes: path_str(path[1:]) for path, axes in reversed(found.items())}
    where = "; ".join(sorted(f"{path}: {', '.join(sorted(x))}" for x, path in shown.items()))
    raise ConfigError(
        f"{caller}: which axes of the mesh shard the batch? The arguments do not agree ({where}). "
        "Name those that shard weights only to save memory, fsdp=('x',), or fsdp=() for none"
    )


def _first_entry(x: Any) -> frozenset[str]:
    sharding = named_sharding(x)
    entry = next(filter(None, sharding.spec), ()) if sharding is not None else ()
    return frozenset(entry if isinstance(entry, tuple) else (entry,))


def named_sharding(x: Any) -> NamedSharding | None:
    """Return how an array on a mesh, or what stands for it, is sharded; None where that is unknown.

    Under tracing only axes that are explicit are known. A quantized weight is sharded as its codes.
    """
    if is_quantized(x):
        x = x.fields[x.format.codes]
    if isinstance(x, jax.core.Tracer):
        sharding = jax.typeof(x).sharding
        return sharding if any(sharding.spec) else None
    found = getattr(x, "sharding", None)
    return found if isinstance(found, NamedSharding) else None
