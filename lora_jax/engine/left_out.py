"""What `targets="all-linear"` leaves out, and why: read off the uses of each weight."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.core.dtypes import is_floating
from lora_jax.engine.layout_inference import contractions, is_linear
from lora_jax.engine.uses import OPAQUE, Use


def matrices_left_out(
    leaves: Mapping[str, Any], uses: Mapping[str, Sequence[Use]]
) -> dict[str, tuple[str, bool]]:
    """Return the leaves of two axes or more that are not linear layers: why not, and if it shows.

    By path: (the reason with its primitives and lines, whether a user might not expect it). A table
    whose rows are looked up, a bias of several axes and a stack of norms are not taken for layers.
    """
    found: dict[str, tuple[str, bool]] = {}
    for path, leaf in leaves.items():
        own = uses.get(path, ())
        if len(getattr(leaf, "shape", ())) < 2 or (is_floating(leaf) and is_linear(own)):
            continue
        looked_up = any(use.primitive == "gather" for use in contractions(own))
        if not is_floating(leaf):
            found[path] = f"{leaf.dtype} numbers cannot be trained", False
        elif not own:
            found[path] = "the function does not use it", False
        elif looked_up:
            found[path] = f"looked up by {_sites(contractions(own))}, as an embedding is", False
        else:
            found[path] = _why_not_linear(own)
    return found


def _why_not_linear(uses: Sequence[Use]) -> tuple[str, bool]:
    """Return how a weight is used that does not look like a layer's, and if it may be one's."""
    contracted = contractions(uses)
    others = [use for use in uses if use not in contracted]
    opaque = [use for use in others if use.primitive in OPAQUE]
    if opaque and not contracted:
        return f"{_sites(opaque)} does not show how it is used", True
    if not contracted:
        return f"used by {_sites(others)}, and contracted with no activation", False
    if others:
        return f"changed by {_sites(others)} before {_sites(contracted)} contracts it", True
    return f"on the left of another weight in {_sites(contracted)}", False


def _sites(uses: Sequence[Use], shown: int = 3) -> str:
    """Return primitives with their lines: "`add` at model.py:12"."""
    sites = [*dict.fromkeys(f"`{use.primitive}` at {use.line}" for use in uses)]
    more = f" and {len(sites) - shown} more" if len(sites) > shown else ""
    return ", ".join(sites[:shown]) + more
