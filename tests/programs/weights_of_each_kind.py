"""One weight of each kind, adapted with each initializer: what their tests run over."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from lora_jax import LoraConfig, initializers
from lora_jax.initializers.rounding import int8, nf4

KEY = jax.random.key(0)
RANK, ALPHA = 4, 6  # scale 1.5


def normal(seed, *shape):
    return jax.random.normal(jax.random.fold_in(KEY, seed), shape)


@dataclasses.dataclass(frozen=True)
class Row:
    """A weight, the program that uses it, and the weight as matrices [batch, in, out]."""

    name: str
    axes: str
    shape: tuple[int, ...]
    fn: Callable  # of the weight and x
    x: Any
    matrices: Callable
    dtype: Any = jnp.float32

    def __str__(self) -> str:
        return self.name

    @property
    def w(self) -> jax.Array:
        # Not normal: singular values that fall, as those of trained weights do.
        falling = jnp.linspace(0.1, 1, self.shape[-1])
        return (normal(1, *self.shape) * jnp.broadcast_to(falling, self.shape)).astype(self.dtype)


def convolve(w, x):
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dims)


def stacked(w, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


X24, X16 = normal(2, 5, 24), normal(2, 5, 16)
ROWS = [
    Row("linear", "io", (24, 16), lambda w, x: x @ w, X24, lambda w: w[None]),
    Row("transposed", "oi", (24, 16), lambda w, x: x @ w.T, X16, lambda w: w.T[None]),
    Row(
        "conv", "iiio", (3, 3, 2, 8), convolve, normal(2, 2, 5, 5, 2), lambda w: w.reshape(1, -1, 8)
    ),
    Row(
        "attention",
        "ioo",
        (16, 3, 4),
        lambda w, x: jnp.einsum("ne,ehd->nhd", x, w),
        X16,
        lambda w: w.reshape(1, 16, 12),
    ),
    Row("stacked", "bio", (3, 16, 16), stacked, X16, lambda w: w),
    Row(
        "bfloat16",
        "io",
        (24, 16),
        lambda w, x: x @ w.astype(x.dtype),
        X24,
        lambda w: w[None],
        jnp.bfloat16,
    ),
    Row("lookup", "io", (24, 16), lambda w, i: w[i], jnp.arange(5), lambda w: w[None]),
]
LINEAR = ROWS[0]
PARAMS = {row.name: row.w for row in ROWS}
INPUTS = {row.name: row.x for row in ROWS}
QUANTIZERS = {"loftq": jax.jit(nf4), "loftq of int8": jax.jit(int8)}


def program(params, inputs):
    return {row.name: row.fn(params[row.name], inputs[row.name]) for row in ROWS}


def config(name, **fields):
    return LoraConfig(**{"rank": RANK, "alpha": ALPHA, "init": name, **fields})


def init(params, name):
    return lora_jax.init(KEY, params, config(name, targets=list(PARAMS)), program, INPUTS)


@functools.cache
def initialized(name):
    """All weights of the table adapted at once; compiled, which is faster than one by one."""
    how = initializers.loftq(int8, steps=2) if name == "loftq of int8" else name
    return jax.jit(lambda params: init(params, how))(PARAMS)


def as_matrices(row, node):
    """The base, A and B as float32 matrices, [batch, in, out], [batch, in, r], [batch, r, out]."""
    w = row.matrices(np.asarray(node.w, np.float32))
    batch, rank = len(w), node.a.shape[-1]
    a, b = np.asarray(node.a, np.float32), np.asarray(node.b, np.float32)
    return w, a.reshape(batch, -1, rank), b.reshape(batch, rank, -1)


def original(row):
    return row.matrices(np.asarray(PARAMS[row.name], np.float32))


def tail(matrices, rank):
    """The norm of what the best approximation of this rank leaves."""
    return np.sqrt((np.linalg.svd(matrices, compute_uv=False)[:, rank:] ** 2).sum())
