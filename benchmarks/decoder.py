"""The model of the benchmarks: a decoder-only transformer, plain functions over a dict."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

VARIANTS = ("unrolled", "scan", "scan_remat")
#: The weights of a block that are adapted.
ADAPTED = ("q", "k", "v", "o", "up", "down")


@dataclasses.dataclass(frozen=True)
class Size:
    """Size of the model and its batch."""

    layers: int = 4
    width: int = 512
    heads: int = 8
    vocabulary: int = 8192
    batch: int = 4
    time: int = 128
    rank: int = 8

    def kernels(self) -> dict[str, tuple[int, int]]:
        """Return the shape of each adapted weight of one block."""
        width = self.width
        square = dict.fromkeys("qkvo", (width, width))
        return {**square, "up": (width, 4 * width), "down": (4 * width, width)}


def normal(name: str, *shape: int) -> np.ndarray:
    """Draw values whose variance keeps activations in range, always the same for a `name`."""
    # With NumPy: XLA would compile a generator for every shape.
    rng = np.random.default_rng(list(name.encode()))
    return rng.standard_normal(shape, np.float32) * np.float32(shape[-2] ** -0.5)


def init(size: Size, variant: str) -> dict[str, Any]:
    """Draw parameters; `layers` is a list of blocks, or stacked for the variants that scan."""
    layers = {name: normal(name, size.layers, *shape) for name, shape in size.kernels().items()}
    for name in ("attn_norm", "mlp_norm"):
        layers[name] = np.ones((size.layers, size.width), np.float32)
    params = {
        "embed": normal("embed", size.vocabulary, size.width) * size.vocabulary**0.5,
        "positions": normal("positions", size.time, size.width),
        "layers": per_block(layers, variant),
        "norm": np.ones(size.width, np.float32),
        "unembed": normal("unembed", size.width, size.vocabulary),
    }
    return jax.tree.map(jnp.asarray, params)


def adapters(size: Size, variant: str) -> Any:
    """Draw {name: (A, B)} in a tree like `init(...)["layers"]`; B is not zero."""
    layers = {
        name: (
            normal(name + ".a", size.layers, rows, size.rank),
            normal(name + ".b", size.layers, size.rank, columns) * 0.03,
        )
        for name, (rows, columns) in size.kernels().items()
    }
    return jax.tree.map(jnp.asarray, per_block(layers, variant))


def per_block(layers: Any, variant: str) -> Any:
    """Return stacked arrays as they are, or a list with the slices of each block."""
    if variant != "unrolled":
        return layers
    count = len(jax.tree.leaves(layers)[0])
    return [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(count)]


def tokens(size: Size) -> jax.Array:
    """Draw a batch `[batch, time + 1]`: all but the last are inputs, all but the first targets."""
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(0, size.vocabulary, (size.batch, size.time + 1), np.int32))


def rms_norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Compute x / rms(x) · weight, over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * weight


def attention(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> jax.Array:
    """Compute causal attention; all arrays are `[batch, time, width]`."""
    batch, time, width = q.shape
    q, k, v = (x.reshape(batch, time, heads, width // heads) for x in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (width // heads) ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones((time, time), bool)), scores, -1e30)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(batch, time, width)


def plain(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiply an activation by a weight that is not adapted."""
    return x @ w


def block(x: jax.Array, p: dict[str, Any], *, heads: int, product: Callable = plain) -> jax.Array:
    """Apply one pre-norm block to `[batch, time, width]`."""
    h = rms_norm(x, p["attn_norm"])
    q, k, v = (product(h, p[name]) for name in "qkv")
    x = x + product(attention(q, k, v, heads), p["o"])
    h = rms_norm(x, p["mlp_norm"])
    return x + product(jax.nn.gelu(product(h, p["up"])), p["down"])


def embed(params: dict[str, Any], inputs: jax.Array) -> jax.Array:
    """Map token ids `[batch, time]` to `[batch, time, width]`."""
    return params["embed"][inputs] + params["positions"][: inputs.shape[1]]


def blocks(
    x: jax.Array,
    layers: Any,
    heads: int,
    variant: str,
    product: Callable = plain,
    policy: Callable | None = None,
) -> jax.Array:
    """Apply all blocks, one after another or in a `lax.scan`."""
    one = functools.partial(block, heads=heads, product=product)
    if variant == "unrolled":
        for p in layers:
            x = one(x, p)
        return x
    if variant == "scan_remat":
        one = jax.checkpoint(one, policy=policy, prevent_cse=False)  # not needed inside a scan
    return jax.lax.scan(lambda x, p: (one(x, p), None), x, layers)[0]


def cross_entropy(params: dict[str, Any], x: jax.Array, targets: jax.Array) -> jax.Array:
    """Compute the mean loss of the last block's output."""
    logits = rms_norm(x, params["norm"]) @ params["unembed"]
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - picked).mean()


def loss(
    params: dict[str, Any], batch: jax.Array, heads: int, variant: str, **options: Any
) -> jax.Array:
    """Compute the next-token cross-entropy of a batch from `tokens`."""
    x = blocks(embed(params, batch[:, :-1]), params["layers"], heads, variant, **options)
    return cross_entropy(params, x, batch[:, 1:])
