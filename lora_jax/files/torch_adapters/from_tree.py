"""Turn the adapted leaves of a tree into the `Contents` of a file."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.adapters.split import split
from lora_jax.core.errors import StructureError, grouped, warn_user
from lora_jax.core.foreign import shown
from lora_jax.core.layout import Layout
from lora_jax.core.patterns import nearest
from lora_jax.core.slots import all_unpadded
from lora_jax.core.tree import adapted_nodes, require_adapted
from lora_jax.core.weights import Adapted, LoraWeight, TrainedLeaf, TrainedRows, check_fits
from lora_jax.files.disk.processes import to_host
from lora_jax.files.naming import Naming, Place
from lora_jax.files.torch_adapters.contents import Contents, TorchBase, dtype_problem, part_of
from lora_jax.files.torch_adapters.experts import Experts, stack_experts
from lora_jax.files.torch_adapters.factors import (
    TorchFactors,
    common_dtype,
    concatenate,
    join_factors,
)

_SWAP = str.maketrans("io", "oi")
#: The parts of one PyTorch tensor that leaves share, by their start along its out axis.
_Parts = dict[str, dict[int, Any]]
#: The same for factors, by the tensor and the expert in it, if it contains experts.
_FactorParts = dict[tuple[str, int | None], dict[int, TorchFactors]]


def collect_nodes(nodes: Mapping[str, Adapted], model: TorchBase) -> tuple[Contents, list[str]]:
    """Return what a file of these nodes holds, and why it cannot hold the rest.

    Layers whose scale is 0 are left out, as are components of the factors that are padding.
    """
    found, problems = Contents(), []
    factors: _FactorParts = {}
    experts: dict[str, dict[int, TorchFactors]] = {}
    whole: _Parts = {}
    for path, node in nodes.items():
        problem = _problem(path, node, model)
        if problem:
            problems.append(problem)
            continue
        place, node = model.places[path], to_host(node)
        if isinstance(node, LoraWeight):
            _take_factors(place, _align_to_row(place, node), factors)
        elif isinstance(node, TrainedLeaf):
            _take_complete(place, node, whole)
        elif node.scale != 0:
            (name,) = place.layers()[0][1]
            found.rows[name] = node.rows, _rows_to_torch(place, np.asarray(node.value))
    for (name, expert), parts in factors.items():
        try:
            joined = join_factors(*_sort_parts(name, parts, model))
        except ValueError:
            problems.append(f"{name}: only a part of this tensor has DoRA; adapt all of it or none")
            continue
        assert joined is not None
        if expert is None:
            found.factors[name] = joined
        else:
            experts.setdefault(name, {})[expert] = joined
    found.experts = {name: stack_experts(x, model.count(name)) for name, x in experts.items()}
    for name, values in whole.items():
        value = _complete(name, values, model)
        if value is None:
            problems.append(f"{name}: only a part of it is trained; pass base= for the rest")
        else:
            found.whole[name] = value
    return found, problems


def _problem(path: str, node: Adapted, model: TorchBase) -> str | None:
    place = model.places.get(path)
    if place is None:
        return f"{path}: no row of the naming has this path"
    if isinstance(node, TrainedLeaf):
        return None
    axes = place.entry.layout if place.entry.kind else ""
    if isinstance(node, TrainedRows):
        alone = len(place.shared_with) == len(place.entry.torch_names) == 1
        letter = "i" if place.entry.kind == "embedding" else "o"
        rows_axes = [i for i, kind in enumerate(axes) if kind == letter]
        same_batch = node.layout.axes.replace("o", "i") == axes.replace("o", "i")
        fits = rows_axes == [node.axis] and same_batch
        if alone and fits and place.entry.kind in ("embedding", "linear"):
            return None
        return (
            f"{path}: trained rows can be saved only for an embedding or output head that is a "
            "separate PyTorch tensor"
        )
    if place.entry.has_experts and node.magnitude is not None:
        return f"{path}: PEFT does not support DoRA for experts' parameters"
    if place.entry.has_experts and node.layout.axes == _swap_sides(axes):
        return None
    if node.layout.axes != axes:
        kind = f"of kind {place.entry.kind!r}, which means {axes!r}" if axes else "without a kind"
        return f"{path}: has the layout {node.layout.axes!r}, but its row in the naming is {kind}"
    return None


def _swap_sides(axes: str) -> str:
    return axes.translate(_SWAP)


def _align_to_row(place: Place, node: LoraWeight) -> LoraWeight:
    """Return the node with the row's layout: what is an input here may be an output in PEFT.

    PEFT takes the last axis of a parameter of experts for the inputs even where it is not, as in
    Llama 4. The update is the same, with A and B exchanged.
    """
    if node.layout.axes == place.entry.layout:
        return node
    rank = len(place.batch)
    a, b = np.moveaxis(np.asarray(node.b), rank, -1), np.moveaxis(np.asarray(node.a), -1, rank)
    return dataclasses.replace(node, a=a, b=b, layout=Layout(place.entry.layout))


def _take_factors(place: Place, node: LoraWeight, into: _FactorParts) -> None:
    a, b, scale = (np.asarray(x) for x in (node.a, node.b, node.scale))
    for where, names, expert in place.modules():
        if scale[where] == 0:
            continue
        magnitude = node.magnitude
        one = TorchFactors(
            place.a_to_torch(a[where]),
            place.b_to_torch(b[where]),
            float(scale[where]),
            None if magnitude is None else place.out_to_torch(np.asarray(magnitude)[where]),
        ).drop_padding()
        for name, part in zip(names, _cut(one, place.widths), strict=True):
            if part is not None:
                into.setdefault((name, expert), {})[place.start] = part


def _cut(one: TorchFactors, widths: Sequence[int]) -> list[TorchFactors | None]:
    """Cut factors into those of the joined modules; None for a module that is not adapted."""
    if len(widths) == 1:
        return [one]
    stops = np.cumsum(widths)
    parts = [one.cut(stop - width, stop) for stop, width in zip(stops, widths, strict=True)]
    if one.magnitude is not None or not one.b.any():
        return [part.drop_unused() for part in parts]
    return [part.drop_unused() if part.b.any() else None for part in parts]


def _take_complete(place: Place, node: TrainedLeaf, into: _Parts) -> None:
    value = np.asarray(node.value)
    scale = np.broadcast_to(np.asarray(node.scale), value.shape)
    for where, names in place.layers():
        if np.any(scale[place.at(where)]):
            for i, name in enumerate(names):
                into.setdefault(name, {})[place.start] = part_of(place, value, where, i)


def _sort_parts(
    name: str, parts: Mapping[int, TorchFactors], model: TorchBase
) -> tuple[list[TorchFactors | None], list[int]]:
    """Return the parts of a tensor along its outputs, None where not adapted, and their widths."""
    ordered: list[TorchFactors | None] = []
    widths: list[int] = []
    for start in sorted(parts):
        if start > sum(widths):
            ordered.append(None)
            widths.append(start - sum(widths))
        ordered.append(parts[start])
        widths.append(parts[start].outputs)
    rest = model.outputs(name) - sum(widths)
    return (ordered + [None], widths + [rest]) if rest else (ordered, widths)


def _complete(name: str, parts: Mapping[int, np.ndarray], model: TorchBase) -> np.ndarray | None:
    """Complete a tensor of which these parts are trained; None if the rest is unknown."""
    axis = model.index[name][0][0].entry.out_axis
    first = next(iter(parts.values()))
    shape = model.shape(name)
    if first.shape == shape:
        return first
    if sum(part.shape[axis] for part in parts.values()) == shape[axis]:
        return concatenate([parts[start] for start in sorted(parts)], axis)
    base = model.value(name)
    if base is None:
        return None
    value = np.array(base, common_dtype([base, first]))
    for start, part in parts.items():
        value[(slice(None),) * axis + (slice(start, start + part.shape[axis]),)] = part
    return value


def _rows_to_torch(place: Place, value: np.ndarray) -> np.ndarray:
    """Turn the leaf's `[rows, *out]` into `[rows, dim]` of PyTorch's embedding or head."""
    if place.entry.kind == "embedding":
        return place.b_to_torch(value).T
    return place.a_to_torch(np.moveaxis(value, 0, -1))


def collect(adapters: Any, naming: Naming, base: Any) -> tuple[Contents, TorchBase]:
    """Return what a file of these adapters holds, and their base through its naming.

    Args:
      adapters: an overlay or a joined tree.
      naming: of the base.
      base: None where it is not known; a joined tree brings its own.

    Raises:
      StructureError: what a file cannot hold; all problems are listed at once.
    """
    nodes = all_unpadded(require_adapted("save", adapters))
    base = _own_base(adapters) if base is None else base
    known = _known_shapes(nodes) if base is None else base
    model = TorchBase(known, naming, adapted_only=base is None)
    check(_misfits(nodes, model))
    contents, problems = collect_nodes(nodes, model)
    check(problems)
    contents.dropout = _common_dropout(nodes)
    return contents, model


def _common_dropout(nodes: Mapping[str, Adapted]) -> float:
    """Return the one rate that a file can hold; warn if the factors have several."""
    active = {p: x for p, x in nodes.items() if isinstance(x, LoraWeight) and np.any(x.scale != 0)}
    counts = Counter(float(node.dropout) for node in active.values())
    if not counts:
        return 0.0
    rate = max(counts, key=lambda x: (counts[x], -x))
    others = [f"{path} ({x.dropout})" for path, x in active.items() if x.dropout != rate]
    if others:
        warn_user(
            f"save: the file holds one dropout rate, and gets {rate}, that of most weights; "
            f"others: {shown(', '.join(others))}"
        )
    return rate


def _own_base(adapters: Any) -> Any:
    """Return the base of a joined tree, or None for an overlay."""
    nodes = adapted_nodes(adapters).values()
    return split(adapters)[0] if nodes and all(node.w is not None for node in nodes) else None


def check(problems: list[str]) -> None:
    """Raise one StructureError that lists all problems, if there are any."""
    if problems:
        lines = grouped(sorted(problems))
        raise StructureError(f"save: the file cannot hold these adapters:\n{lines}")


def find_unloadable(contents: Contents) -> list[str]:
    """List values that a reader of the file would reject: not finite, or not floating-point."""
    arrays: list[tuple[str, np.ndarray | None]] = [*contents.whole.items()]
    arrays += [(name, values) for name, (_, values) in contents.rows.items()]
    arrays += [(name, one.magnitude) for name, one in contents.factors.items()]
    adapters: dict[str, TorchFactors | Experts] = {**contents.factors, **contents.experts}
    for name, one in adapters.items():
        arrays += [(name, one.a), (name, one.b), (name, np.asarray(one.scale, "float32"))]
    problems = {}
    for name, x in arrays:
        if x is not None and (dtype_problem(x) or not np.isfinite(x).all()):
            problems[name] = dtype_problem(x) or "has NaN or infinite values, or exceeds float32"
    return [f"{name}: {problem}" for name, problem in problems.items()]


def _known_shapes(nodes: Mapping[str, Adapted]) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of the base that the adapters alone tell, by path."""
    of_rows = [path for path, node in nodes.items() if isinstance(node, TrainedRows)]
    check([f"{path}: trained rows of an embedding need its shape; pass base=" for path in of_rows])
    return {path: jax.ShapeDtypeStruct(node.shape, "float32") for path, node in nodes.items()}


def _misfits(nodes: Mapping[str, Adapted], model: TorchBase) -> list[str]:
    problems = []
    for path, node in nodes.items():
        if path not in model.leaves:
            problems.append(f"{path}: not in the base; {nearest(path, model.leaves)}")
        else:
            problems += check_fits(path, node, model.leaves[path])
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(node)):
            problems.append(f"{path}: is abstract (ShapeDtypeStruct), without values")
    return problems
