"""The mesh of a run: its axes by name, and how rows are divided over it."""

import difflib
import math
from collections.abc import Mapping

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lora_jax.core.foreign import shown
from lora_jax.models.on_mesh import AXES_OF_ROWS
from lora_jax.training.errors import TrainingError

#: From the slowest links to the fastest: devices of one process are neighbours along the last.
AXES = ("data", "fsdp", "expert", "tensor")
AUTO = "auto"


def parse_mesh(text: str) -> dict[str, int]:
    """Return the devices along each axis, in the order of `AXES`.

    Args:
      text: such as "fsdp=4,tensor=2".

    Raises:
      TrainingError: an axis is unknown or named twice, or a number is not positive.

    >>> parse_mesh("tensor=2, fsdp=4")
    {'fsdp': 4, 'tensor': 2}
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, equals, count = (x.strip() for x in part.partition("="))
        if not equals or not count.isdecimal() or not count.isascii() or int(count) < 1:
            raise TrainingError(
                f"--mesh: {shown(repr(part.strip()))} is not an axis and its number of devices; "
                "write it like fsdp=4,tensor=2, or auto"
            )
        if name not in AXES:
            near = difflib.get_close_matches(name, AXES, 1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise TrainingError(
                f"--mesh: unknown axis {shown(repr(name))}{hint} The axes are {', '.join(AXES)}"
            )
        if name in found:
            raise TrainingError(f"--mesh: the axis {name} is given twice")
        found[name] = int(count)
    return {name: found[name] for name in AXES if name in found}


def choose_axes(devices: int, rows: int) -> dict[str, int]:
    """Return the axes for `auto`: FSDP over as many devices as divide the rows, then tensor.

    Args:
      devices: how many there are.
      rows: of a micro-batch.

    >>> choose_axes(8, rows=16), choose_axes(8, rows=4), choose_axes(2, rows=3)
    ({'fsdp': 8}, {'fsdp': 4, 'tensor': 2}, {'tensor': 2})
    """
    fsdp = math.gcd(devices, rows)
    axes = {"fsdp": fsdp, "tensor": devices // fsdp}
    return {name: n for name, n in axes.items() if n > 1} or {"fsdp": 1}


def make_mesh(axes: Mapping[str, int]) -> Mesh:
    """Return a mesh of all devices of all processes.

    Args:
      axes: from `parse_mesh` or `choose_axes`.

    Raises:
      TrainingError: the number of devices is another one.
    """
    needed, there = math.prod(axes.values()), jax.device_count()
    if needed != there:
        own = jax.local_device_count()
        of = f" ({own} in each of {jax.process_count()} processes)" if own != there else ""
        raise TrainingError(
            f"--mesh {describe(axes)} is of {needed} devices, but there are {there}{of}; "
            "use all of them, or --mesh auto"
        )
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes))


def describe(axes: Mapping[str, int]) -> str:
    """Return axes as `parse_mesh` reads them.

    >>> describe({"fsdp": 4, "tensor": 2})
    'fsdp=4,tensor=2'
    """
    return ",".join(f"{name}={count}" for name, count in axes.items())


def check_rows(mesh: Mesh, rows: int) -> None:
    """Check that the rows of a micro-batch can be divided over a mesh.

    Raises:
      TrainingError: they cannot; the message says how many could.
    """
    parts = math.prod(mesh.shape[name] for name in AXES_OF_ROWS if name in mesh.shape)
    if rows % parts:
        over = " × ".join(f"{n}={mesh.shape[n]}" for n in AXES_OF_ROWS if n in mesh.shape)
        raise TrainingError(
            f"--batch {rows}: the rows cannot be divided over {over}; use --batch "
            f"{_next_multiple(rows, parts)}, or fewer devices along these axes"
        )


def _next_multiple(rows: int, parts: int) -> int:
    return -(-rows // parts) * parts


def row_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Return how an array lies on a mesh one of whose axes is the rows of a batch."""
    names = tuple(name for name in AXES_OF_ROWS if name in mesh.shape)
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, names or None))


def mesh_of(tree: object) -> Mesh | None:
    """Return the mesh of several devices on which arrays of a tree lie; None if on none.

    >>> mesh_of({"a": jax.numpy.ones(3)})
    """
    for x in jax.tree.leaves(tree):
        sharding = getattr(x, "sharding", None)
        mesh = getattr(sharding, "mesh", None)
        if isinstance(mesh, Mesh) and mesh.size > 1:
            return mesh
    return None
