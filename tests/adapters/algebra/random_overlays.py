"""Random overlays of one base with weights of every layout, and their dense meaning in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import Layout, LoraWeight

#: Layout and shape of each weight.
KINDS = {
    "linear": ("io", (6, 5)),
    "transposed": ("oi", (5, 7)),
    "attention": ("ioo", (6, 2, 3)),
    "conv": ("iiio", (2, 2, 3, 4)),
    "stacked": ("bio", (3, 6, 5)),
    "experts": ("ibo", (4, 2, 5)),
}
SHAPES = {path: shape for path, (_, shape) in KINDS.items()}


def random_node(rng, axes, shape, rank, size=1.0, dtype=jnp.float32):
    """Return a node of an overlay with random factors of this size, and random scales."""
    layout = Layout(axes)
    put = lambda x, dtype: jax.device_put(x.astype(dtype))  # `asarray` compiles for each shape
    normal = lambda shape: put(size * rng.normal(size=shape), dtype)
    a, b = normal(layout.a_shape(shape, rank)), normal(layout.b_shape(shape, rank))
    scale = put(np.asarray(rng.uniform(0.5, 2, layout.select("b", shape))), jnp.float32)
    return LoraWeight(None, a, b, scale, layout=layout)


def overlay(seed, rank=2, *, kinds=tuple(KINDS), dtype=jnp.float32):
    """Return an overlay with all paths in it, None where it does not adapt a weight."""
    rng = np.random.default_rng(seed)
    made = {path: random_node(rng, *KINDS[path], rank, dtype=dtype) for path in KINDS}
    return {path: node if path in kinds else None for path, node in made.items()}


def update(node):
    """Return scale·A·B in float64."""
    names = dict.fromkeys("bio", "")
    for letter, kind in zip("abcde", node.layout.axes, strict=False):
        names[kind] += letter
    a, b, scale = (np.asarray(x, np.float64) for x in (node.a, node.b, node.scale))
    batch, ins, outs = names.values()
    every = "abcde"[: len(node.layout.axes)]
    return np.einsum(f"{batch}{ins}r,{batch}r{outs},{batch}->{every}", a, b, scale)


def total(overlays, weights):
    """Return Σ wᵢ·ΔWᵢ by path, in float64."""
    found = {path: np.zeros(shape) for path, shape in SHAPES.items()}
    for nodes, weight in zip(overlays, weights, strict=True):
        for path, node in nodes.items():
            found[path] += 0 if node is None else weight * update(node)
    return found


def matrices(path, w):
    """Return a weight as `[batch, in, out]`."""
    axes, _ = KINDS[path]
    order = [i for kind in "bio" for i, letter in enumerate(axes) if letter == kind]
    sizes = [
        np.prod([n for n, x in zip(w.shape, axes, strict=True) if x == kind]) for kind in "bio"
    ]
    return w.transpose(order).reshape([int(n) for n in sizes])


def close(got, want, rtol=2e-6):
    """Compare the nodes of an overlay with dense updates, each within a share of its largest."""
    for path, node in got.items():
        size = max(np.abs(want[path]).max(), 1)
        np.testing.assert_allclose(update(node), want[path], atol=rtol * size, err_msg=path)
