"""Checksums of a base, which show leaf by leaf whether two trees have the same weights."""

import functools
import hashlib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.core.host_memory import on_device
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.quantized.weight import QuantizedWeight, dequantize_array, is_quantized
from lora_jax.core.sharding.meshes import automatic, has_explicit_mesh
from lora_jax.core.weights import is_adapted

_ENTRY = re.compile(r"(\w+)\[((?:\d{1,12}(?:,\d{1,12})*)?)\](?::\w+)?")

Pair = tuple[Any, Any]  # two sums, uint32

#: What a checksum starts with. Those of older releases start with nothing.
_MIXED = "mix_"

_HEX = re.compile("[0-9a-f]{16}")
_QUANTIZED = re.compile(r"(\w+)_([0-9a-f]{16})_([0-9a-f]{16})")


def fingerprint(
    base: Any, skip: Collection[str] = (), weak: Collection[str] = ()
) -> dict[str, str]:
    """Return `{path: "float32[4,3]:mix_1a2b3c4d5e6f7a8b"}`: each array's dtype, shape and checksum.

    The checksum moves with any bit of any element: the sum of a mixture of each element's bits and
    position, twice 32 bits. It is computed where the array lies, in integers, so it is the same for
    every backend and sharding, and no device gets the parts of another.
    Abstract leaves (`ShapeDtypeStruct`) get no checksum.

    A quantized weight has the kind and two checksums, "float32[64,3]:nf4_1a2b..._3c4d...": of its
    arrays, and of the values that they stand for, which a floating weight may have too.

    Args:
      base: a parameter tree without adapters.
      skip: paths to leave out (the leaves that adapters replace completely).
      weak: paths that get the checksum of older releases, see `weak_entries`.
    """
    leaves, _ = flatten_with_paths(base, is_leaf=is_adapted)
    arrays = {p: x for p, x in leaves.items() if hasattr(x, "dtype") and p not in skip}
    known = {p: x for p, x in arrays.items() if not _is_abstract(x)}
    codes = {p: x for p, x in known.items() if is_quantized(x)}
    sums = {
        p: _sums(x, weighted if p in weak else mixed) for p, x in known.items() if p not in codes
    }
    texts = {p: _hex(pair, p in weak) for p, pair in jax.device_get(sums).items()}
    texts |= {p: f":{x.kind}" for p, x in arrays.items() if is_quantized(x)}
    texts |= {p: f":{x.kind}_{_of_codes(x)}_{_of_values(x)}" for p, x in codes.items()}
    return {
        path: f"{x.dtype}[{','.join(map(str, x.shape))}]" + texts.get(path, "")
        for path, x in arrays.items()
    }


def _is_abstract(x: Any) -> bool:
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(x))


def parse_entry(text: Any) -> jax.ShapeDtypeStruct | None:
    """Return the shape and dtype in one entry of a fingerprint, or None if it is not an entry.

    >>> parse_entry("float32[4,3]:mix_1a2b3c4d5e6f7a8b")
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


class Entry(NamedTuple):
    """One entry of a fingerprint in its parts."""

    array: str  # "float32[4,3]"
    kind: str  # of a quantized weight, or ""
    codes: str  # the checksum of its arrays, or ""
    values: str  # the checksum of the values, or ""

    @classmethod
    def of(cls, text: str) -> "Entry":
        """Return the parts of an entry.

        >>> Entry.of("float32[4,3]:mix_1a2b3c4d5e6f7a8b").values
        'mix_1a2b3c4d5e6f7a8b'
        >>> Entry.of("float32[64,3]:nf4_1a2b3c4d5e6f7a8b_0011223344556677").kind
        'nf4'
        """
        array, _, rest = text.partition(":")
        match = _QUANTIZED.fullmatch(rest)
        if match is not None:
            return cls(array, match[1], match[2], _MIXED + match[3])
        is_sum = not rest or rest.startswith(_MIXED) or _HEX.fullmatch(rest) is not None
        if is_sum or not rest.isidentifier():  # a damaged kind counts as another sum
            return cls(array, "", "", rest)
        return cls(array, rest, "", "")

    def __str__(self) -> str:
        """Return what it says besides checksums: "float32[64,3] as nf4"."""
        return f"{self.array} as {self.kind}" if self.kind else self.array

    def has_other_values(self, other: "Entry") -> bool:
        """Return whether checksums show that the values differ; those that lack one may be equal.

        Where the codes are equal, so are the values, whatever a compiler rounds.
        """
        if self.codes and self.codes == other.codes:
            return False
        return bool(self.values and other.values and self.values != other.values)


def differences(saved: Mapping[str, str], base: Mapping[str, str]) -> list[str]:
    """List the differences, one line per leaf; checksums count only if both have one.

    Where one of them is quantized, and the other is not or in another way, see `recoded`.
    """
    lines = [f"{path}: not in this base" for path in saved if path not in base]
    lines += [f"{path}: not in the adapters' base" for path in base if path not in saved]
    for path in saved.keys() & base.keys():
        was, now = Entry.of(saved[path]), Entry.of(base[path])
        is_alike = was.kind == now.kind
        if was.array != now.array if is_alike else _shape(was) != _shape(now):
            lines.append(f"{path}: is {now}, but the adapters were trained on {was}")
        elif is_alike and was.has_other_values(now):
            lines.append(f"{path}: other values than the adapters were trained on")
    return sorted(lines)


def recoded(saved: Mapping[str, str], base: Mapping[str, str]) -> list[str]:
    """List the leaves that are quantized in another way, one line each, unless values are equal.

    >>> recoded({"w": "float32[64,3]:nf4"}, {"w": "float32[64,3]:mix_1a2b3c4d5e6f7a8b"})
    ['w: is float32[64,3], and the adapters were trained on float32[64,3] as nf4']
    """
    lines = []
    for path in sorted(saved.keys() & base.keys()):
        was, now = Entry.of(saved[path]), Entry.of(base[path])
        is_equal = was.array == now.array and was.values and was.values == now.values
        if was.kind != now.kind and not is_equal:
            lines.append(f"{path}: is {now}, and the adapters were trained on {was}")
    return lines


def _shape(entry: Entry) -> str:
    return entry.array.partition("[")[2]


def weak_entries(saved: Mapping[str, str]) -> list[str]:
    """Return the paths with a checksum of an older release.

    That one is a sum of the words and a sum of the words times odd numbers, which an even number of
    changed signs leaves as they are.

    >>> weak_entries({"a": "float32[1]:1a2b3c4d5e6f7a8b", "b": "float32[1]:mix_1a2b3c4d5e6f7a8b"})
    ['a']
    """
    return [p for p, text in saved.items() if _HEX.fullmatch(text.partition(":")[2])]


def _hex(pair: Any, weak: bool) -> str:
    return f":{'' if weak else _MIXED}{_digits(pair)}"


def _digits(pair: Any) -> str:
    return "".join(f"{int(x):08x}" for x in pair)


def _of_codes(w: QuantizedWeight) -> str:
    """Return the checksum of the arrays of a quantized weight, by name, and of their axis."""
    sums = jax.device_get({name: mixed(x) for name, x in w.fields.items()})
    text = "".join(f"{name}:{_digits(sums[name])};" for name in sorted(sums))
    return hashlib.blake2b(f"{text}{w.axis}".encode(), digest_size=8).hexdigest()


def _of_values(w: QuantizedWeight) -> str:
    """Return the checksum of the values of a quantized weight, of one stacked matrix at a time."""
    stacked = max(0, min(w.axis, -2) + w.ndim)
    codes = w.fields[w.format.codes]
    if has_explicit_mesh(codes) or stacked == 0:
        return _digits(jax.device_get(_mixed_values(w)))
    first, second = jnp.uint32(0), jnp.uint32(0)
    for index in np.ndindex(w.shape[:stacked]):
        at = tuple(slice(i, i + 1) for i in index)
        part = jax.tree.map(lambda x, at=at: x[at], w)
        sums = _mixed_values(part, w.shape, np.asarray(index, np.uint32))
        first, second = first + sums[0], second + sums[1]
    return _digits(jax.device_get((first, second)))


@functools.partial(jax.jit, static_argnums=1)
def _mixed_values(w: Any, shape: tuple[int, ...] | None = None, start: Any = None) -> Pair:
    return automatic(lambda w: mixed(dequantize_array(w), shape, start))(w)


def _sums(x: Any, checksum: Callable[..., Pair]) -> Pair:
    """Return the checksum of an array, or of a leaf that stays in its file."""
    if not hasattr(x, "parts"):
        return checksum(x)
    first, second = 0, 0
    for start, part in x.parts():  # the sum of the parts' sums; one part is in memory at a time
        sums = checksum(jnp.asarray(part), x.shape, np.asarray(start, np.uint32))
        first, second = (int(a) + int(b) for a, b in zip((first, second), sums, strict=True))
    return np.uint32(first % 2**32), np.uint32(second % 2**32)


def _compiled(checksum: Callable[[jax.Array, jax.Array], Pair]) -> Callable[..., Pair]:
    """Return a function of an array, or of a part of one, its shape, and where the part starts."""

    @functools.partial(jax.jit, static_argnums=1)
    def call(x: Any, shape: tuple[int, ...] | None = None, start: Any = None) -> Pair:
        def sums(x: Any) -> Pair:
            words = _words(x)
            whole = words.shape if shape is None else (*shape, *words.shape[len(shape) :])
            return checksum(words, _positions(words.shape, whole, start))

        return automatic(sums)(x)

    return functools.wraps(checksum)(call)


@_compiled
def mixed(words: jax.Array, positions: jax.Array) -> Pair:
    """Sum two mixtures of each word with its position, modulo 2³².

    For a given position both are one-to-one in the word: one changed word always moves both sums,
    and several changes cancel in both with a probability of 2⁻⁶⁴.
    """
    place = _scramble(positions * np.uint32(2654435761) + np.uint32(1))
    first = _scramble(words ^ place)
    return _add_up(first, _scramble(first + place))


def _scramble(x: jax.Array) -> jax.Array:
    """Return a one-to-one mixture of the bits of uint32: the last step of MurmurHash3."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


@_compiled
def weighted(words: jax.Array, positions: jax.Array) -> Pair:
    """Sum the words modulo 2³², plain and weighted by position: the checksum of older releases."""
    place = positions * np.uint32(2654435761) | np.uint32(1)
    return _add_up(words, words * place)


def _add_up(*found: jax.Array) -> Pair:
    """Return the sums of arrays of one shape, in one reduction: no device holds the arrays."""
    zeros = tuple(np.uint32(0) for _ in found)
    add = lambda x, y: tuple(a + b for a, b in zip(x, y, strict=True))
    return lax.reduce(found, zeros, add, tuple(range(found[0].ndim)))


def _words(x: jax.Array) -> jax.Array:
    """Return the bits of `x` as uint32, an element of up to 4 bytes as one, a wider one as two."""
    x = on_device(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_ or jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else jnp.stack([x.real, x.imag])
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.int8) if jnp.iinfo(x.dtype).bits < 8 else x
    elif jnp.finfo(x.dtype).bits < 8:
        x = x.astype(jnp.float32)
    return lax.bitcast_convert_type(x, f"uint{8 * min(4, x.dtype.itemsize)}").astype(jnp.uint32)


def _positions(shape: tuple[int, ...], whole: tuple[int, ...], start: Any = None) -> jax.Array:
    """Return the number of each element in row-major order, modulo 2³², without a reshape.

    Args:
      shape: of a part of an array, or of all of it.
      whole: the array's shape.
      start: where the part starts along the first axes.
    """
    found, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        index = lax.broadcasted_iota(jnp.uint32, shape, axis)
        index += 0 if start is None or axis >= len(start) else start[axis]
        found += index * np.uint32(stride % 2**32)
        stride *= whole[axis]
    return found
