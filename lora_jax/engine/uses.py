"""`Use`: what a program does with each axis of a parameter."""

import dataclasses
from collections.abc import Mapping, Sequence

from lora_jax.engine.lazy_weight import LazyWeight

#: Primitives that do not show what they do with an array: using a weight they say nothing.
OPAQUE = ("pallas_call", "pure_callback", "io_callback", "ffi_call", "custom_call", "shard_map")


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a weight: the primitive, and what it does with each axis of the parameter."""

    path: str
    primitive: str
    line: str
    # parameter axis -> "b", "i" or "o"; empty for a use that is not a contraction
    axes: dict[int, str]
    # whether it is not simply a layer there: left of another weight, or altered on the way
    is_operand: bool = False


def uses_of(
    lazy: LazyWeight, primitive: str, line: str, kinds: dict[int, str], is_operand: bool = False
) -> list[Use]:
    """Return one use per parameter in a view, from the kinds of all their axes."""
    uses, start = [], 0
    for paths, ndim in lazy.origin.sources:
        own = {axis - start: kind for axis, kind in kinds.items() if 0 <= axis - start < ndim}
        uses += [Use(path, primitive, line, own, is_operand) for path in paths]
        start += ndim
    return uses


def dense_uses(lazy: LazyWeight, primitive: str, line: str) -> list[Use]:
    """Return uses that are not contractions; of rows that were looked up, the lookup itself."""
    if not lazy.origin.looked_up:
        return uses_of(lazy, primitive, line, {})
    kinds = {origin: "o" for axis in lazy.axes for origin in axis.origins}
    return uses_of(lazy, "gather", line, kinds | dict.fromkeys(lazy.origin.indexed, "i"))


Uses = Mapping[str, Sequence[Use]] | None
