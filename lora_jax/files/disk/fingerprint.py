"""Checksums of a base, which show leaf by leaf whether two trees have the same weights."""

import re
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.weights import is_adapted

_ENTRY = re.compile(r"(\w+)\[((?:\d{1,12}(?:,\d{1,12})*)?)\](?::\w+)?")


def fingerprint(base: Any, skip: Collection[str] = ()) -> dict[str, str]:
    """Return `{path: "float32[4,3]:1a2b3c4d5e6f7a8b"}`: each array's dtype, shape and checksum.

    The checksum covers the bits, and is computed on the arrays' devices, in integers, so it is the
    same for every backend and sharding.
    Abstract leaves (`ShapeDtypeStruct`) get no checksum.

    Args:
      base: a parameter tree without adapters.
      skip: paths to leave out (the leaves that adapters replace completely).
    """
    leaves, _ = flatten_with_paths(base, is_leaf=is_adapted)
    arrays = {p: x for p, x in leaves.items() if hasattr(x, "dtype") and p not in skip}
    known = {p: x for p, x in arrays.items() if not isinstance(x, jax.ShapeDtypeStruct)}
    sums = dict(zip(known, jax.device_get([_checksum(x) for x in known.values()]), strict=True))
    return {
        path: f"{x.dtype}[{','.join(map(str, x.shape))}]"
        + (_hex(sums[path]) if path in sums else "")
        for path, x in arrays.items()
    }


def parse_entry(text: Any) -> jax.ShapeDtypeStruct | None:
    """Return the shape and dtype in one entry of a fingerprint, or None if it is not an entry.

    >>> parse_entry("float32[4,3]:1a2b3c4d5e6f7a8b")
    ShapeDtypeStruct(shape=(4, 3), dtype=float32)
    """
    match = _ENTRY.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        return None
    try:
        dtype = jnp.dtype(match[1])
    except TypeError:
        return None
    is_known = dtype == jnp.bool_ or jnp.issubdtype(dtype, jnp.number)
    shape = tuple(int(n) for n in match[2].split(",") if n)
    return jax.ShapeDtypeStruct(shape, dtype) if is_known else None


def differences(saved: dict[str, str], base: dict[str, str]) -> list[str]:
    """List the differences, one line per leaf; checksums count only if both have one."""
    lines = [f"{path}: not in this base" for path in saved if path not in base]
    lines += [f"{path}: not in the adapters' base" for path in base if path not in saved]
    for path in saved.keys() & base.keys():
        (was, _, was_sum), (now, _, now_sum) = saved[path].partition(":"), base[path].partition(":")
        if was != now:
            lines.append(f"{path}: is {now}, but the adapters were trained on {was}")
        elif was_sum and now_sum and was_sum != now_sum:
            lines.append(f"{path}: has other values than the adapters were trained on")
    return sorted(lines)


def _hex(pair: Any) -> str:
    return ":" + "".join(f"{int(x):08x}" for x in pair)


@jax.jit
def _checksum(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute two sums of the words modulo 2³², the second weighted by position: order counts."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_ or jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else jnp.stack([x.real, x.imag])
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.int8) if jnp.iinfo(x.dtype).bits < 8 else x
    elif jnp.finfo(x.dtype).bits < 8:
        x = x.astype(jnp.float32)
    words = jax.lax.bitcast_convert_type(x, f"uint{8 * min(4, x.dtype.itemsize)}").ravel()
    words = words.astype(jnp.uint32)
    # An odd weight per position, mixed so that no two swapped words cancel out.
    place = jax.lax.iota(jnp.uint32, words.size) * np.uint32(2654435761) | np.uint32(1)
    return words.sum(dtype=jnp.uint32), (words * place).sum(dtype=jnp.uint32)
