"""`eva`: starting values of A from the inputs that each weight meets, and ranks where they pay."""

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
from lora_jax.core.paths import path_key
from lora_jax.core.patterns import Pattern
from lora_jax.core.weights import LoraWeight
from lora_jax.engine.custom_rules import Rule, check_rules
from lora_jax.initializers.example_batches import as_batches
from lora_jax.initializers.input_moments import Arrays, Inputs, Sums, matrix_shape
from lora_jax.initializers.untrained import fresh_weights, replaced

#: Up to this many inputs the whole second moment `[fan_in, fan_in]` is made, by one more pass.
EXACT_UP_TO = 1024

#: Columns of a sketch beyond those that are wanted.
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
) -> Any:
    """Start A at the directions in which the inputs of each weight vary most; B stays zero.

    Explained Variance Adaptation (https://arxiv.org/abs/2410.07170): the columns of A are the top
    right singular vectors of the weight's inputs, centred, over example batches; and ranks go where
    they explain most. Every component of every weight counts by the part of the variance it
    explains, λ/Σλ; the largest are kept, within the budget of the ranks in `params`, and no weight
    gets more than ρ times its own. A stack of layers has one rank, counted by the mean over its
    adapted layers, and pays for it in each. The scale of each weight stays what it was, as PEFT's
    does.

    The inputs are never gathered, also not from `scan`, `vmap` and `remat`: the gradient of ½‖x·Ω‖²
    with respect to Ω is their second moment times Ω. Of a weight with up to 1,024 inputs that is
    all of it, in two passes over the batches; of a wider one a sketch with ρ·rank + 8 columns,
    refined `passes` times.

    Args:
      fn: the function that runs on the parameters, their first argument. Its floating outputs must
        depend on the weights, for what is cut off from them would not train either.
      params: a tree as `init` returns it: what to adapt, in which layout, at which ranks.
      batches: tuples of the arguments of `fn` after the parameters. Tokens of padding count like
        others, so leave them out. All batches are kept until the end.
      rho: the most that a rank may grow by; 1 leaves the ranks as they are.
      targets: a pattern as in `LoraConfig` over the adapted paths; None for all. Others keep
        their start and their rank.
      passes: how often a sketch of a wide weight is refined, each over all batches.
      rules: as for `lora`.

    Returns:
      The same tree with new A, and B of the new ranks. A weight whose rank comes out as zero is
      not adapted any more: its base leaf stands in its place.

    Raises:
      ConfigError: there is no batch, `rho` is below 1, or `fn` returns no floating array.
      TargetError: a weight met no input: an embedding that is looked up has none (name the others
        in `targets`), and inputs are not seen where a weight is made dense or no gradient arrives.
      StructureError: `params` holds no adapters or no values, or their update is not zero.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((3, 2))}
    >>> def model(params, x):
    ...     return x @ params["kernel"]
    >>> x = jnp.array([[1.0, 2.0, 0.0], [1.0, -2.0, 0.0], [1.0, 0.0, 1.0], [1.0, 0.0, -1.0]])
    >>> adapted = lora_jax.init(jax.random.key(0), params, lora_jax.LoraConfig(rank=1), model, x)
    >>> eva(model, adapted, [(x,)])["kernel"].a.round(3) + 0.0  # what is constant explains nothing
    Array([[0.],
           [1.],
           [0.]], dtype=float32)
    """
    _check(rho, passes)
    check_rules(rules)
    nodes = fresh_weights("eva", params, targets)
    inputs = Inputs(fn, params, as_batches("eva", batches), rules)
    sums = inputs.sums(nodes)
    counts = jax.device_get({path: found.count for path, found in sums.items()})
    _check_seen({path: bool(count.any()) for path, count in counts.items()})
    caps = {path: _cap(node, rho) for path, node in nodes.items()}
    vectors, ratios = _components(inputs, nodes, sums, caps, passes)
    layers = {path: int(_adapted_layers(node).sum()) for path, node in nodes.items()}
    ranks = redistribute(ratios, {path: node.rank for path, node in nodes.items()}, layers)
    return replaced(params, {p: _started(n, vectors[p], ranks[p]) for p, n in nodes.items()})


def _check(rho: Any, passes: Any) -> None:
    if not is_number(rho) or float(rho) < 1:
        raise ConfigError(f"eva: rho must be a number of at least 1, got {rho!r}")
    if not is_integer(passes) or passes < 1:
        raise ConfigError(f"eva: passes must be a positive integer, got {passes!r}")


def _check_seen(seen: Mapping[str, bool]) -> None:
    unseen = [path for path, found in seen.items() if not found]
    if unseen:
        raise TargetError(
            f"eva: no inputs seen of {', '.join(unseen)}. Rows that are looked up have none, and "
            "none are seen where a weight is made dense, is multiplied from its out side, or is "
            "sharded along its inputs inside a shard_map, nor where the function's outputs do not "
            "depend on them. Name the other weights in targets="
        )


@jax.jit
def _traces(
    sums: Mapping[str, Sums], sketches: Arrays, products: Arrays
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """tr(Ωᵀ·C·Ω) and tr(C) by path, all layers together."""
    return {p: ((s * products[p]).sum(), sums[p].squares.sum()) for p, s in sketches.items()}


def _check_all_seen(sums: Mapping[str, Sums], sketches: Arrays, products: Arrays) -> None:
    """The products must see what the sums saw; shapes may decide whether a weight stays lazy."""
    seen = {}
    for path, (sketched, whole) in jax.device_get(_traces(sums, sketches, products)).items():
        exact = math.isclose(sketched, whole, rel_tol=0.01)
        seen[path] = exact or (not _is_whole(sketches[path]) and sketched > 0)
    _check_seen(seen)


def _adapted_layers(node: LoraWeight) -> np.ndarray:
    """Which layers of a stack are adapted, `[*batch]`; all of them where the tree is disabled."""
    on = np.asarray(node.scale) != 0
    return on if on.any() else np.ones_like(on)


def _cap(node: LoraWeight, rho: float) -> int:
    """The largest rank that a weight may get."""
    shape = node.shape
    return min(round(rho * node.rank), node.layout.fan_in(shape), node.layout.fan_out(shape))


def _components(
    inputs: Inputs,
    nodes: Mapping[str, LoraWeight],
    sums: Mapping[str, Sums],
    caps: Mapping[str, int],
    passes: int,
) -> tuple[Arrays, dict[str, np.ndarray]]:
    """The top directions `[*batch, fan_in, cap]` by path, and the share of the variance of each."""
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
        vectors[path], ratios[path] = _analysed(sums[path], *pair, on, caps[path])
    return vectors, jax.device_get(ratios)


Pair = tuple[jax.Array, jax.Array]  # a sketch, and the second moment times it


@functools.partial(jax.jit, static_argnames="number")
def _analysed(
    sums: Sums, sketch: jax.Array, products: jax.Array, on: jax.Array, number: int
) -> tuple[jax.Array, jax.Array]:
    """The top directions of the centred inputs; the share of each, its mean over layers `on`."""
    values, vectors = top_components(sketch, sums.centered(products, sketch), number)
    variance = sums.variance()[..., None]
    share = jnp.where(variance > 0, values / jnp.where(variance > 0, variance, 1), 0)
    return vectors, share.reshape(-1, number).mean(0, where=on.reshape(-1, 1))


def _sketch(path: str, shape: tuple[int, ...]) -> jax.Array:
    """Orthonormal columns at random, of this shape; the identity where the weight is narrow."""
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
    """The largest eigenvalues of C and their vectors, from Ω and C·Ω: `[..., n]`, `[..., m, n]`.

    Ω is the identity, or has orthonormal columns: then those of Nyström's approximation
    `CΩ·(ΩᵀCΩ)⁻¹·(CΩ)ᵀ` (Halko, Martinsson and Tropp, https://arxiv.org/abs/0909.4061, 5.5). The
    largest entry of every vector is positive.

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
    """Eigenvalues, the largest first, and their vectors."""
    values, vectors = jnp.linalg.eigh((matrix + jnp.swapaxes(matrix, -1, -2)) / 2)
    return values[..., ::-1], vectors[..., ::-1]


def redistribute(
    ratios: Mapping[str, Any], ranks: Mapping[str, int], layers: Mapping[str, int]
) -> dict[str, int]:
    """New ranks: the components that explain most, while the budget Σ rank·layers lasts.

    Args:
      ratios: what part of the variance each component of a weight explains, falling; at most as
        many components as its rank may become.
      ranks: the ranks now.
      layers: of how many layers each weight is a stack.

    >>> ratios = {"q": [0.6, 0.3, 0.05, 0.04], "k": [0.2, 0.2, 0.2, 0.2]}
    >>> redistribute(ratios, {"q": 2, "k": 2}, {"q": 1, "k": 1})
    {'q': 2, 'k': 2}
    >>> redistribute({"q": [0.6, 0.3], "k": [0.2, 0.1]}, {"q": 1, "k": 1}, {"q": 1, "k": 1})
    {'q': 2, 'k': 0}
    """
    left = sum(rank * layers[path] for path, rank in ranks.items())
    found = dict.fromkeys(ranks, 0)
    order = [(ratio, path) for path in ranks for ratio in ratios[path]]
    for _, path in sorted(order, key=lambda item: -item[0]):  # of equals the first in the tree
        if layers[path] <= left:
            found[path] += 1
            left -= layers[path]
    return found


def _started(node: LoraWeight, vectors: jax.Array, rank: int) -> Any:
    if not rank:
        return node.w
    shape = node.shape
    a = vectors[..., :rank].reshape(node.layout.a_shape(shape, rank)).astype(node.a.dtype)
    b = jnp.zeros(node.layout.b_shape(shape, rank), node.b.dtype)
    return dataclasses.replace(node, a=a, b=b)
