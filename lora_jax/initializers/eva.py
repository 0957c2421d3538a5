"""`eva`: initialize A from the inputs of each weight, and give ranks where they explain most."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.checks import is_integer, is_number
from lora_jax.core.errors import ConfigError, TargetError
from lora_jax.core.linalg import matmul
from lora_jax.core.params_argument import params_first
from lora_jax.core.paths import path_key
from lora_jax.core.patterns import Pattern
from lora_jax.core.weights import LoraWeight
from lora_jax.engine.custom_rules import Rule, check_rules
from lora_jax.initializers.example_batches import as_batches
from lora_jax.initializers.input_moments import Arrays, Inputs, Sums, matrix_shape
from lora_jax.initializers.untrained import put_nodes, require_untrained

#: Up to this fan_in the whole second moment `[fan_in, fan_in]` is computed, in one more pass.
EXACT_UP_TO = 1024

#: Columns of a sketch beyond the number of wanted components.
OVERSAMPLE = 8


def eva(
    fn: Callable,
    params: Any,
    batches: Iterable[tuple],
    *,
    rho: float = 2.0,
    targets: Pattern | None = None,
    passes: int = 3,
    rules: Mapping[str, Rule] | None = None,
    argnum: int = 0,
    argname: str | None = None,
) -> Any:
    """Initialize A with the directions in which a weight's inputs vary most; B stays zero.

    Explained Variance Adaptation, https://arxiv.org/abs/2410.07170: the columns of A are the top
    right singular vectors of the weight's centered inputs over example batches, and ranks go where
    they explain most. Each component of each weight counts by the share of the variance that it
    explains, λ/Σλ. The largest shares are kept, within the total rank of `params`, and no weight
    gets more than ρ times its own rank. A stack of layers has one rank; it counts by its mean share
    over the adapted layers, and costs its rank in each of them. The scale of each weight stays the
    same, as in PEFT.

    The inputs are never collected, not even inside `scan`, `vmap` and `remat`: the gradient of
    ½‖x·Ω‖² with respect to Ω is their second moment times Ω. A weight with fan_in up to 1,024 gets
    its whole second moment, in two passes over the batches; a wider one a sketch with ρ·rank + 8
    columns, refined `passes` times.

    Args:
      fn: the function of the parameters. Its floating outputs must depend on
        the weights: a weight that they do not depend on would not train either.
      params: a tree as `init` returns it, which says what is adapted, with which layout and rank.
      batches: tuples of the other arguments of `fn`. Padding tokens count like all
        others, so leave them out. All batches are kept until the end.
      rho: the factor by which a rank may grow at most; 1 leaves the ranks as they are.
      targets: a pattern as in `LoraConfig` over the adapted paths; None for all. Other weights keep
        their initialization and rank.
      passes: how often the sketch of a wide weight is refined, each time over all batches.
      rules: as for `lora`.
      argnum: the position of the parameters among the arguments of `fn`, as for `init`.
      argname: their name, as for `init`.

    Returns:
      The same tree with new A, and B of the new ranks. A weight whose new rank is zero is no longer
      adapted: its base weight takes its place.

    Raises:
      ConfigError: `batches` is empty, `rho` is below 1, or `fn` returns no floating array.
      TargetError: no inputs were recorded for a weight, because it is only used in an embedding
        lookup, is materialized, or gets no gradient. Select the other weights with `targets`.
      StructureError: `params` has no adapters or no values, or their update is not zero.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((3, 2))}
    >>> def model(params, x):
    ...     return x @ params["kernel"]
    >>> x = jnp.array([[1.0, 2.0, 0.0], [1.0, -2.0, 0.0], [1.0, 0.0, 1.0], [1.0, 0.0, -1.0]])
    >>> adapted = lora_jax.init(jax.random.key(0), params, lora_jax.LoraConfig(rank=1), model, x)
    >>> eva(model, adapted, [(x,)])["kernel"].a.round(3) + 0.0  # a constant input explains nothing
    Array([[0.],
           [1.],
           [0.]], dtype=float32)
    """
    _check(rho, passes)
    check_rules(rules)
    fn = params_first("eva", fn, argnum, argname)
    nodes = require_untrained("eva", params, targets)
    inputs = Inputs(fn, params, as_batches("eva", batches), rules)
    sums = inputs.sums(nodes)
    counts = jax.device_get({path: found.count for path, found in sums.items()})
    _check_seen({path: bool(count.any()) for path, count in counts.items()})
    caps = {path: _cap(node, rho) for path, node in nodes.items()}
    vectors, ratios = _components(inputs, nodes, sums, caps, passes)
    layers = {path: int(_adapted_layers(node).sum()) for path, node in nodes.items()}
    ranks = redistribute(ratios, {path: node.rank for path, node in nodes.items()}, layers)
    return put_nodes(params, {p: _initialize(n, vectors[p], ranks[p]) for p, n in nodes.items()})


def _check(rho: Any, passes: Any) -> None:
    if not is_number(rho) or float(rho) < 1:
        raise ConfigError(f"eva: rho must be a number of at least 1, got {rho!r}")
    if not is_integer(passes) or passes < 1:
        raise ConfigError(f"eva: passes must be a positive integer, got {passes!r}")


def _check_seen(seen: Mapping[str, bool]) -> None:
    unseen = [path for path, found in seen.items() if not found]
    if unseen:
        raise TargetError(
            f"eva: recorded no inputs for {', '.join(unseen)}. Possible reasons: the weight is "
            "only used in an embedding lookup; it is materialized; it is contracted along its "
            "output axes; it is sharded along its input axes inside shard_map; or the outputs of "
            "fn do not depend on it. Select the other weights with targets="
        )


@jax.jit
def _traces(
    sums: Mapping[str, Sums], sketches: Arrays, products: Arrays
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Return tr(Ωᵀ·C·Ω) and tr(C) by path, summed over layers."""
    return {p: ((s * products[p]).sum(), sums[p].squares.sum()) for p, s in sketches.items()}


def _check_all_seen(sums: Mapping[str, Sums], sketches: Arrays, products: Arrays) -> None:
    """Raise unless the products saw all inputs that the sums saw.

    They may not have: the shape of a sketch may decide whether a weight stays lazy.
    """
    seen = {}
    for path, (sketched, whole) in jax.device_get(_traces(sums, sketches, products)).items():
        exact = math.isclose(sketched, whole, rel_tol=0.01)
        seen[path] = exact or (not _is_whole(sketches[path]) and sketched > 0)
    _check_seen(seen)


def _adapted_layers(node: LoraWeight) -> np.ndarray:
    """Return which layers of a stack are adapted, `[*batch]`; all if the tree is disabled."""
    on = np.asarray(node.scale) != 0
    return on if on.any() else np.ones_like(on)


def _cap(node: LoraWeight, rho: float) -> int:
    """Return the largest rank that a weight may get."""
    shape = node.shape
    return min(round(rho * node.rank), node.layout.fan_in(shape), node.layout.fan_out(shape))


def _components(
    inputs: Inputs,
    nodes: Mapping[str, LoraWeight],
    sums: Mapping[str, Sums],
    caps: Mapping[str, int],
    passes: int,
) -> tuple[Arrays, dict[str, np.ndarray]]:
    """Return the top directions `[*batch, fan_in, cap]` by path, and the variance share of each."""
    shapes = {p: (*matrix_shape(node), caps[p] + OVERSAMPLE) for p, node in nodes.items()}
    sketches = jax.jit(lambda: {path: _sketch(path, shape) for path, shape in shapes.items()})()
    found: dict[str, Pair] = {}
    for turn in range(passes):
        if turn:
            sketches = {
                path: jnp.linalg.qr(sums[path].centered(products, sketch))[0]
                for path, (sketch, products) in found.items()
                if not _is_whole(sketch)
            }
        if sketches:
            products = inputs.products(sketches)
            _check_all_seen(sums, sketches, products)
            found |= {path: (s, products[path]) for path, s in sketches.items()}
    vectors, ratios = {}, {}
    for path, pair in found.items():
        on = _adapted_layers(nodes[path])
        vectors[path], ratios[path] = _top_shares(sums[path], *pair, on, caps[path])
    return vectors, jax.device_get(ratios)


Pair = tuple[jax.Array, jax.Array]  # a sketch, and the second moment times it


@functools.partial(jax.jit, static_argnames="number")
def _top_shares(
    sums: Sums, sketch: jax.Array, products: jax.Array, on: jax.Array, number: int
) -> tuple[jax.Array, jax.Array]:
    """Return the top directions of the centered inputs, and their mean share over layers `on`."""
    values, vectors = top_components(sketch, sums.centered(products, sketch), number)
    variance = sums.variance()[..., None]
    share = jnp.where(variance > 0, values / jnp.where(variance > 0, variance, 1), 0)
    return vectors, share.reshape(-1, number).mean(0, where=on.reshape(-1, 1))


def _sketch(path: str, shape: tuple[int, ...]) -> jax.Array:
    """Return random orthonormal columns of this shape, or the identity for a narrow weight."""
    *batch, fan_in, columns = shape
    if fan_in <= max(columns, EXACT_UP_TO):
        return jnp.broadcast_to(jnp.eye(fan_in), (*batch, fan_in, fan_in))
    key = path_key(jax.random.key(0), path)
    return jnp.linalg.qr(jax.random.normal(key, shape))[0]


def _is_whole(sketch: jax.Array) -> bool:
    return sketch.shape[-1] == sketch.shape[-2]


def top_components(
    sketch: jax.Array, products: jax.Array, number: int
) -> tuple[jax.Array, jax.Array]:
    """Return C's largest eigenvalues `[..., n]` and their vectors `[..., m, n]`, from Ω and C·Ω.

    Ω is the identity, or has orthonormal columns. In the latter case they are the eigenvalues of
    the Nyström approximation `CΩ·(ΩᵀCΩ)⁻¹·(CΩ)ᵀ` (Halko, Martinsson and Tropp,
    https://arxiv.org/abs/0909.4061, section 5.5). The entry of largest magnitude of each vector is
    positive.

    >>> import jax.numpy as jnp
    >>> values, vectors = top_components(jnp.eye(2), jnp.array([[2.0, 1.0], [1.0, 2.0]]), 1)
    >>> values.round().tolist(), (vectors[:, 0] * jnp.sqrt(2)).round(3).tolist()
    ([3.0], [1.0, 1.0])
    """
    if _is_whole(sketch):
        values, vectors = _symmetric(products)
    else:
        inner, basis = _symmetric(matmul(jnp.swapaxes(sketch, -1, -2), products))
        tiny = inner[..., :1] * jnp.finfo(inner.dtype).eps * inner.shape[-1]
        root = jnp.where(inner > tiny, jax.lax.rsqrt(jnp.maximum(inner, tiny)), 0)
        half = matmul(products, basis) * root[..., None, :]
        vectors, singular, _ = jnp.linalg.svd(half, full_matrices=False)
        values = singular**2
    vectors = vectors[..., :number]
    largest = jnp.take_along_axis(vectors, jnp.abs(vectors).argmax(-2, keepdims=True), -2)
    return jnp.maximum(values[..., :number], 0), vectors * jnp.where(largest < 0, -1, 1)


def _symmetric(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the eigenvalues, the largest first, and their vectors."""
    values, vectors = jnp.linalg.eigh((matrix + jnp.swapaxes(matrix, -1, -2)) / 2)
    return values[..., ::-1], vectors[..., ::-1]


def redistribute(
    ratios: Mapping[str, Any], ranks: Mapping[str, int], layers: Mapping[str, int]
) -> dict[str, int]:
    """Return new ranks: the components that explain most, within the budget Σ rank·layers.

    Args:
      ratios: the share of the variance that each component of a weight explains, in descending
        order; at most as many components as the weight's rank may become.
      ranks: the current ranks.
      layers: the number of layers that each weight stacks.

    >>> ratios = {"q": [0.6, 0.3, 0.05, 0.04], "k": [0.2, 0.2, 0.2, 0.2]}
    >>> redistribute(ratios, {"q": 2, "k": 2}, {"q": 1, "k": 1})
    {'q': 2, 'k': 2}
    >>> redistribute({"q": [0.6, 0.3], "k": [0.2, 0.1]}, {"q": 1, "k": 1}, {"q": 1, "k": 1})
    {'q': 2, 'k': 0}
    """
    left = sum(rank * layers[path] for path, rank in ranks.items())
    found = dict.fromkeys(ranks, 0)
    order = [(ratio, path) for path in ranks for ratio in ratios[path]]
    # The sort is stable: among equal ratios the first in the tree wins.
    for _, path in sorted(order, key=lambda item: -item[0]):
        if layers[path] <= left:
            found[path] += 1
            left -= layers[path]
    return found


def _initialize(node: LoraWeight, vectors: jax.Array, rank: int) -> Any:
    if not rank:
        return node.w
    shape = node.shape
    a = vectors[..., :rank].reshape(node.layout.a_shape(shape, rank)).astype(node.a.dtype)
    b = jnp.zeros(node.layout.b_shape(shape, rank), node.b.dtype)
    return dataclasses.replace(node, a=a, b=b)
