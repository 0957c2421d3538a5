"""Codes of a few bits, packed in bytes along an axis, and small tables of values."""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def map_nibbles(fn: Callable[[jax.Array], jax.Array], codes: jax.Array, axis: int) -> jax.Array:
    """Return `fn` of packed codes: of the low halves of all bytes, then of the high halves.

    `fn` is applied to the halves, not to the unpacked codes, which XLA would make an array of.

    >>> map_nibbles(lambda c: c * 10, jnp.array([0x21, 0x43], jnp.uint8), -1)
    Array([10, 30, 20, 40], dtype=uint8)
    """
    return jnp.concatenate([fn(codes & jnp.uint8(15)), fn(codes >> jnp.uint8(4))], axis)


def pack_nibbles(codes: jax.Array, axis: int) -> jax.Array:
    """Return bytes whose low halves are the first half of the codes; see `map_nibbles`."""
    low, high = jnp.split(codes.astype(jnp.uint8), 2, axis)
    return low | (high << jnp.uint8(4))


def unpack(x: jax.Array, bits: int, axis: int, run: int) -> jax.Array:
    """Return the codes of packed bytes, `8 / bits` of each, in uint8.

    The codes in the lowest bits of each `run` of bytes come first, then those in the next bits.

    >>> unpack(jnp.array([0x21, 0x43], jnp.uint8), bits=4, axis=-1, run=2)
    Array([1, 3, 2, 4], dtype=uint8)
    >>> unpack(jnp.array([0x21, 0x43], jnp.uint8), bits=4, axis=-1, run=1)
    Array([1, 2, 3, 4], dtype=uint8)
    """
    at = axis % x.ndim
    before, after = x.shape[:at], x.shape[at + 1 :]
    runs = x.reshape(*before, -1, 1, run, *after)
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)
    shifted = runs >> jnp.expand_dims(shifts, [i for i in range(runs.ndim) if i != at + 1])
    return (shifted & jnp.uint8(2**bits - 1)).reshape(*before, -1, *after)


def pack(codes: jax.Array, bits: int, axis: int, run: int) -> jax.Array:
    """Return bytes whose codes are these; the inverse of `unpack`.

    >>> pack(jnp.array([1, 3, 2, 4], jnp.uint8), bits=4, axis=-1, run=2)
    Array([33, 67], dtype=uint8)
    """
    at = axis % codes.ndim
    before, after = codes.shape[:at], codes.shape[at + 1 :]
    runs = codes.astype(jnp.uint8).reshape(*before, -1, 8 // bits, run, *after)
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)
    shifted = runs << jnp.expand_dims(shifts, [i for i in range(runs.ndim) if i != at + 1])
    return shifted.sum(at + 1, dtype=jnp.uint8).reshape(*before, -1, *after)


def look_up(codes: jax.Array, table: Sequence[float]) -> jax.Array:
    """Return `table[codes]` in float32, by selects between constants and not by a gather.

    The table has a power of two entries, and every code is smaller than that.

    >>> look_up(jnp.array([3, 0], jnp.uint8), (0.5, 1.0, 2.0, 4.0))
    Array([4. , 0.5], dtype=float32)
    """
    values = [jnp.float32(x) for x in table]
    bit = 1
    while len(values) > 1:
        is_set = (codes & jnp.uint8(bit)) != 0
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(is_set, odd, even) for even, odd in pairs]
        bit *= 2
    return values[0]


def nearest(values: jax.Array, table: Sequence[float]) -> jax.Array:
    """Return the code of the nearest number in a table, the inverse of `look_up`.

    Halfway between two it is the smaller one, and the first code of a number that is there twice.

    >>> nearest(jnp.array([0.9, 0.75, 9.0]), (0.5, 1.0, 2.0, 4.0))
    Array([1, 0, 3], dtype=uint8)
    """
    codes: dict[float, int] = {}
    for code, value in enumerate(table):
        codes.setdefault(value, code)
    rising = sorted(codes.items())
    found = jnp.full(values.shape, rising[0][1], jnp.uint8)
    for (low, _), (high, code) in itertools.pairwise(rising):
        found = jnp.where(values > (low + high) / 2, jnp.uint8(code), found)
    return found
