"""Optax transformations of pairs: A and B of one weight, as matrices `[*batch, rows, rank]`.

The rows of A are its flattened in axes, those of B its flattened out axes, so that both are tall
and one formula serves for either of them. Batch axes are stacked layers, experts or adapters.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax.adapters.kept_shardings import (
    constrain,
    replicated_on_mesh,
    shardings_of_trained,
)
from lora_jax.adapters.optim import map_fields
from lora_jax.adapters.partition import FREEZE, TRAIN, by_label
from lora_jax.core.dtypes import accumulator, is_floating
from lora_jax.core.errors import StructureError
from lora_jax.core.layout import Layout
from lora_jax.core.matrices import factor_matrices
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.sharding.meshes import gathered, reshard_like
from lora_jax.core.tree import require_adapted
from lora_jax.core.weights import LoraWeight

PAIRS = "pairs"


class Pair(NamedTuple):
    """What belongs to A and what belongs to B of one weight."""

    a: Any
    b: Any

    @property
    def swapped(self) -> "Pair":
        """What belongs to the other factor."""
        return Pair(self.b, self.a)

    def map(self, fn: Callable[..., Any], *others: "Pair") -> "Pair":
        """Return `fn` of what belongs to A, and of what belongs to B."""
        return Pair(*(fn(*values) for values in zip(self, *others, strict=True)))


class PairState(NamedTuple):
    """The state of an optimizer of pairs."""

    count: Any  # int32: the number of updates so far
    kept: dict[str, dict[str, Pair]]  # what the rule keeps, by the first weight of each group


class PairRule(NamedTuple):
    """How to update one pair of matrices; see `on_pairs`."""

    # (gradients, factors, scale `[*batch]` or None, what is kept, count) -> updates, what to keep
    update: Callable[[Pair, Pair, Any, Mapping[str, Pair], Any], tuple[Pair, dict[str, Pair]]]
    init: Callable[[Pair], dict[str, Pair]] = (
        lambda factors: {}
    )  # zeros of the shapes of what is kept
    uses_scale: bool = False


def on_pairs(caller: str, rule: PairRule, params: Any) -> optax.GradientTransformation:
    """Return a transformation that gives all pairs in a tree with opened nodes to `rule`.

    Matrices have float32 numbers (float64 if a factor does); updates have the gradients' shapes.

    Args:
      caller: the name of the function for errors.
      rule: computes with matrices.
      params: the adapted parameters, of which only the layouts are taken.

    Raises:
      StructureError: `params` contains no adapters, or the tree that comes has other pairs.
    """
    nodes = require_adapted(caller, params)
    layouts = {path: x.layout for path, x in nodes.items() if isinstance(x, LoraWeight)}
    shardings = shardings_of_trained(params)
    whole = functools.partial(constrain, sharding=replicated_on_mesh(shardings))

    def init(params: Any) -> PairState:
        leaves, _ = flatten_with_paths(params)
        groups = _groups(leaves, _found(caller, layouts, leaves))
        kept = jax.eval_shape(lambda: {n: rule.init(x.stack(leaves)) for n, x in groups.items()})
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kept)  # sharded like no factor
        return PairState(jnp.zeros([], jnp.int32), zeros)

    def update(updates: Any, state: PairState, params: Any = None) -> tuple[Any, PairState]:
        if params is None:
            raise StructureError(
                f"{caller}: the update of A depends on B: call update(gradients, state, params)"
            )
        (gradients, treedef), (leaves, _) = flatten_with_paths(updates), flatten_with_paths(params)
        made = {path: _unmoved(x) if is_scale(path) else x for path, x in gradients.items()}
        kept = {}
        for name, group in _groups(leaves, _found(caller, layouts, gradients)).items():
            slopes, factors = (group.stack(x).map(whole) for x in (gradients, leaves))
            scale = group.scales(caller, leaves) if rule.uses_scale else None
            own = state.kept[name]
            moves, new = rule.update(slopes, factors, scale, own, state.count)
            own_moves = group.unstack(_without_padding(moves, factors), gradients)
            made |= {path: constrain(x, shardings.get(path)) for path, x in own_moves.items()}
            kept[name] = jax.tree.map(lambda x, old: whole(x.astype(old.dtype)), new, own)
        new_state = PairState(state.count + 1, kept)
        return jax.tree_util.tree_unflatten(treedef, list(made.values())), new_state

    return optax.GradientTransformation(init, update)


def trained_pairs(
    caller: str,
    rule: PairRule,
    after: optax.GradientTransformation,
    params: Any,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Apply `rule` and then `after` to A and B, and `rest` to all else that trains.

    Without `rest` all else goes through `after` too. Transformations see at least float32 numbers,
    and so their state has these; the updates have the gradients' dtypes.
    """
    pairs = on_pairs(caller, rule, params)
    whole = widened(optax.chain(pairs, after))
    transforms = {PAIRS: whole} if rest is None else {PAIRS: whole, TRAIN: widened(rest)}

    def label(path: str, field: str) -> str:
        if field in ("a", "b") or (rule.uses_scale and field == "scale"):
            return PAIRS
        trains = field in ("magnitude", "value")
        return (PAIRS if rest is None else TRAIN) if trains else FREEZE

    return by_label(transforms, functools.partial(map_fields, label), params)


def widened(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Return `tx` with numbers of fewer than 32 bits as float32, and updates as gradients come."""

    def widen(x: Any) -> Any:
        return x.astype(accumulator(x.dtype)) if is_floating(x) else x

    wide = functools.partial(jax.tree.map, widen)
    inner = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        new, state = inner.update(
            wide(updates), state, None if params is None else wide(params), **extra
        )
        return jax.tree.map(lambda x, like: x.astype(like.dtype), new, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: inner.init(wide(params)), update)


Names = tuple[str, str]  # the paths of A and B: ("up/kernel/a", "up/kernel/b")


@dataclasses.dataclass(frozen=True)
class Group:
    """Weights whose factors have the same sizes as matrices; their arrays make one stack.

    They are computed together, because programs with a decomposition for each of hundreds of
    weights take a minute to compile.
    """

    members: tuple[tuple[Names, Layout], ...]

    def stack(self, leaves: Mapping[str, Any]) -> Pair:
        """Return A as `[members, *batch, in, rank]` and B as `[members, *batch, out, rank]`."""
        flat = [_flat(leaves, *one) for one in self.members]
        a, b = (jnp.stack(x) for x in zip(*flat, strict=True))
        dtype = accumulator(a.dtype, b.dtype)
        return Pair(a.astype(dtype), b.astype(dtype).swapaxes(-1, -2))

    def unstack(self, pair: Pair, like: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arrays of such stacks by path, in the shapes that they have in `like`."""
        flat = pair.a, pair.b.swapaxes(-1, -2)
        return {
            path: reshard_like(x[i].reshape(like[path].shape), like[path])
            for i, (names, _) in enumerate(self.members)
            for path, x in zip(names, flat, strict=True)
        }

    def scales(self, caller: str, leaves: Mapping[str, Any]) -> jax.Array:
        """Return the scales `[members, *batch]`."""
        paths = [names[0].removesuffix("a") + "scale" for names, _ in self.members]
        hidden = [path for path in paths if path not in leaves]
        if hidden:
            raise StructureError(
                f"{caller}: {', '.join(hidden)}: not in sight. Call {caller} by itself, not within "
                "freeze or groups: it freezes what does not train"
            )
        return jnp.stack([gathered(leaves[path]) for path in paths])


def _groups(leaves: Mapping[str, Any], found: Mapping[Names, Layout]) -> dict[str, Group]:
    """Return the groups of weights, by the path of the first A of each."""
    alike: dict[Any, list[tuple[Names, Layout]]] = {}
    for names, layout in found.items():
        flat = _flat(leaves, names, layout)
        alike.setdefault(tuple((x.shape, x.dtype) for x in flat), []).append((names, layout))
    return {members[0][0][0]: Group(tuple(members)) for members in alike.values()}


def _flat(leaves: Mapping[str, Any], names: Names, layout: Layout) -> tuple[jax.Array, jax.Array]:
    a, b = names
    return factor_matrices(leaves[a], leaves[b], layout)


def _found(
    caller: str, layouts: Mapping[str, Layout], leaves: Mapping[str, Any]
) -> dict[Names, Layout]:
    """Return the layouts of the pairs whose arrays are among `leaves`."""
    known = {_names(path): layout for path, layout in layouts.items()}
    here = {path for path in leaves if path.rpartition("/")[2] in ("a", "b")}
    unknown = sorted(here.difference(*known))
    if unknown:
        raise StructureError(
            f"{caller}: {', '.join(unknown)}: not among the adapters that {caller} was made for; "
            f"call {caller} with the parameters that train"
        )
    found = {names: layout for names, layout in known.items() if here.intersection(names)}
    alone = [name for names in found for name in here.intersection(names) if not here >= {*names}]
    if alone:
        raise StructureError(
            f"{caller}: {', '.join(alone)} came without the other factor, but A and B of a weight "
            "need the same optimizer: leave out only=, lora_fa, and patterns that end in .a or .b"
        )
    return found


def _names(path: str) -> Names:
    start = f"{path}/" if path else ""
    return f"{start}a", f"{start}b"


def is_scale(path: str) -> bool:
    """Return whether the array at the path of an opened node is its scale."""
    return path.rpartition("/")[2] == "scale"


def _unmoved(x: jax.Array) -> jax.Array:
    return jnp.full_like(x, -0.0)  # as for all else that does not train


def _without_padding(moves: Pair, factors: Pair) -> Pair:
    """Return updates that are exactly zero where a stack pads the rank.

    There a column of A and the row of B are zero, and so are both gradients; but what decomposes
    all columns together may leave rounding errors there.
    """
    used = (factors.a != 0).any(-2) | (factors.b != 0).any(-2)
    return moves.map(lambda x: jnp.where(used[..., None, :], x, jnp.zeros_like(x)))
