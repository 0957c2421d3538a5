"""What a model's layers keep for the backward pass, and what they recompute there: a table."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn

from lora_jax.core.foreign import shown_value
from lora_jax.engine.remat import save_sums

NONE, SUMS, FULL = "none", "sums", "full"
#: Name -> what is kept, from the policy that recomputes least to the one that needs least memory:
#: all; the results of products (of an adapted one the sum alone); nothing but the layers' inputs.
POLICIES: dict[str, Callable[..., Any] | None] = {NONE: None, SUMS: save_sums, FULL: None}


def policy_name(remat: Any) -> str:
    """Return the name of a policy, which a boolean may say: True is `full`.

    Raises:
      ValueError: it is not in `POLICIES`.

    >>> policy_name(True), policy_name("sums")
    ('full', 'sums')
    """
    if isinstance(remat, bool):
        return FULL if remat else NONE
    if not isinstance(remat, str) or remat not in POLICIES:
        raise ValueError(f"remat {shown_value(remat)} is not True, False or one of {[*POLICIES]}")
    return remat


def rematerialized(layer: type[nn.Module], remat: Any, *, scan: bool) -> Any:
    """Return the class of a layer that recomputes what `remat` says; `scan`: it runs in a scan."""
    name = policy_name(remat)
    if name == NONE:
        return layer
    return nn.remat(layer, prevent_cse=not scan, policy=POLICIES[name])
