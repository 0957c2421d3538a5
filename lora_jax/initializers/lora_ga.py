"""`lora_ga`: initialize A and B from the gradient of a loss."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.algebra import dense
from lora_jax.core.checks import is_number
from lora_jax.core.dtypes import accumulator, round_to
from lora_jax.core.errors import ConfigError, TargetError, grouped
from lora_jax.core.linalg import randomized_svd, truncated_svd
from lora_jax.core.matrices import as_factors, map_matrices
from lora_jax.core.params_argument import params_first
from lora_jax.core.paths import path_key
from lora_jax.core.patterns import Pattern
from lora_jax.core.quantized.weight import dequantized, is_quantized
from lora_jax.core.sharding.meshes import gathered, reshard_like
from lora_jax.core.tree import map_adapted
from lora_jax.core.weights import LoraWeight
from lora_jax.initializers.example_batches import Batch, as_batches, sum_over_batches
from lora_jax.initializers.untrained import put_nodes, require_untrained

#: How large the initial factors are, by the names of `lora_ga(..., scale=...)`.
SCALES = ("stable", "unit", "peft")

#: The narrowest matrix whose gradient is decomposed by a sketch.
SKETCH_FROM = 512


def lora_ga(
    loss: Callable,
    params: Any,
    batches: Iterable[tuple],
    *,
    scale: str = "stable",
    gamma: float = 16.0,
    targets: Pattern | None = None,
    argnum: int = 0,
    argname: str | None = None,
) -> Any:
    """Initialize A and B so that their first step moves the weight as full fine-tuning would.

    LoRA-GA, https://arxiv.org/abs/2407.05000: let G = ∂L/∂W = U·S·Vᵀ be the mean gradient over
    example batches. A gets the first `rank` columns of U, B the next `rank` rows of Vᵀ (a weight is
    `[in, out]` here, so U belongs to the inputs), and the base becomes W − scale·A·B. Then one SGD
    step on A and B moves the weight along the best approximation of G of rank 2·rank. Before that
    step the function is unchanged, up to rounding of the base.

    Args:
      loss: a function of the base parameters and a batch that returns a scalar, the mean over the
        batch; `loss(params, *batch)` is called without adapters.
      params: a tree as `init` returns it, which says what is adapted, with which layout and rank.
      batches: tuples of the other arguments of `loss`.
      scale: "stable": A and B are multiplied by `fan_out^¼/√γ`, as in the paper and its code;
        "unit": their columns and rows have length one; "peft": as in PEFT, B alone is multiplied,
        also by the singular values, so that it is as large as the gradient.
      gamma: γ, positive; the larger it is, the smaller A and B are.
      targets: a pattern as in `LoraConfig` over the adapted paths; None for all. The gradients of
        all targeted weights are in memory at the same time; if that is too much, initialize them in
        several calls. On a mesh with explicit axes each weight and its gradient are gathered.
      argnum: the position of the parameters among the arguments of `loss`, as for `init`.
      argname: their name, as for `init`.

    Returns:
      The same tree with new A and B, and a new base in its own dtype, for each target.
      `on_original` turns the trained adapter into one for the original base.

    Raises:
      ConfigError: `batches` is empty, `scale` or `gamma` has no meaning, or `loss` is not a scalar.
      TargetError: a gradient is zero or not finite, or a weight is smaller than 2·rank.
      StructureError: `params` has no adapters or no values, or their update is not zero.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((3, 2))}
    >>> def loss(params, x):
    ...     return (x @ params["kernel"] * jnp.array([[1.0, 2.0]])).sum()
    >>> x = jnp.array([[0.0, 3.0, 0.0]])
    >>> adapted = lora_jax.init(jax.random.key(0), params, lora_jax.LoraConfig(rank=1), loss, x)
    >>> params1 = lora_ga(loss, adapted, [(x,)], scale="unit")  # the gradient is 3·[0 1 0]ᵀ·[1 2]
    >>> jnp.abs(params1["kernel"].a[:, 0]).round(3)
    Array([0., 1., 0.], dtype=float32)
    >>> bool(jnp.allclose(lora_jax.merge(params1)["kernel"], params["kernel"]))
    True
    """
    _check(scale, gamma)
    loss = params_first("lora_ga", loss, argnum, argname)
    nodes = require_untrained("lora_ga", params, targets)
    _check_bases(nodes)
    _check_sizes(nodes)
    gradients = _gradients(loss, params, nodes, as_batches("lora_ga", batches))
    _check_gradients(gradients)
    key = jax.random.key(0)  # of the sketches of large gradients
    made = {
        path: _initialize(path_key(key, path), node, gradients[path], scale, float(gamma))
        for path, node in nodes.items()
    }
    return put_nodes(params, made)


def _check(scale: Any, gamma: Any) -> None:
    if scale not in SCALES:
        raise ConfigError(f"lora_ga: scale must be one of {SCALES}, got {scale!r}")
    if not is_number(gamma) or not 0 < float(gamma) < math.inf:
        raise ConfigError(f"lora_ga: gamma must be a positive number, got {gamma!r}")


def _check_bases(nodes: Mapping[str, LoraWeight]) -> None:
    problems = [
        f"{path}: lora_ga subtracts the update that A and B begin with from the base, and codes of "
        f"{node.w.kind} cannot hold the difference. Begin with floating weights, and quantize the "
        "result: quantize(lora_ga(...), kind); or leave it out of targets="
        for path, node in nodes.items()
        if is_quantized(node.w)
    ]
    if problems:
        raise TargetError(grouped(problems))


def _check_sizes(nodes: Mapping[str, LoraWeight]) -> None:
    problems = []
    for path, node in nodes.items():
        size = min(node.layout.fan_in(node.shape), node.layout.fan_out(node.shape))
        if 2 * node.rank > size:
            problems.append(
                f"{path}: lora_ga needs 2 * rank = {2 * node.rank} directions of the gradient, but "
                f"the weight {node.shape} has only {size}. Lower its rank to {size // 2}, or leave "
                "it out of targets="
            )
    if problems:
        raise TargetError(grouped(problems))


def _check_gradients(gradients: Mapping[str, jax.Array]) -> None:
    sizes = jax.device_get({path: jnp.abs(x).max() for path, x in gradients.items()})
    problems = [
        f"{path}: the loss does not depend on it"
        if size == 0
        else f"{path}: the gradient of the loss contains NaN or infinity"
        for path, size in sizes.items()
        if size == 0 or not math.isfinite(size)
    ]
    if problems:
        raise TargetError("lora_ga: cannot initialize from these gradients:\n" + grouped(problems))


def _gradients(
    loss: Callable, params: Any, nodes: Mapping[str, LoraWeight], batches: list[Batch]
) -> dict[str, jax.Array]:
    """Return ∂L/∂W of `nodes` by path, the mean over batches, in float32 (float64 if W is)."""

    def gradient(weights: dict[str, jax.Array], params: Any, *batch: Any) -> dict[str, jax.Array]:
        def of_weights(weights: dict[str, jax.Array]) -> jax.Array:
            plain = map_adapted(
                lambda path, node: weights[path] if path in weights else dense(node), params
            )
            value = loss(jax.tree.map(dequantized, plain, is_leaf=is_quantized), *batch)
            if jnp.shape(value) or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
                raise ConfigError(
                    "lora_ga: the loss must return a floating scalar, got "
                    f"{jnp.result_type(value)}{list(jnp.shape(value))}"
                )
            return value

        found = jax.grad(of_weights)(weights)
        return {path: g.astype(accumulator(g.dtype)) for path, g in found.items()}

    weights = {path: node.w for path, node in nodes.items()}
    total = sum_over_batches(gradient, (weights, params), batches)
    return {path: g / len(batches) for path, g in total.items()}


@functools.partial(jax.jit, static_argnames=("scale", "gamma"))
def _initialize(
    key: jax.Array, node: LoraWeight, gradient: jax.Array, scale: str, gamma: float
) -> LoraWeight:
    """Return the node with factors from its gradient, and their update subtracted from its base."""
    layout, shape, rank = node.layout, node.shape, node.rank
    size = layout.fan_out(shape) ** 0.25 / math.sqrt(gamma)

    def one(key: jax.Array, matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
        u, s, vt = _svd(key, matrix, 2 * rank)
        a, b = u[:, :rank], vt[rank:]
        if scale == "stable":
            return size * a, size * b
        return (a, size * s[rank:, None] * b) if scale == "peft" else (a, b)

    a, b = map_matrices(one, key, layout, gradient)
    a, b = as_factors(a, b, layout, shape)
    # Subtract the update of the rounded factors, which is the one in effect.
    a = round_to(a, node.a.dtype).astype(node.a.dtype)
    b = round_to(b, node.b.dtype).astype(node.b.dtype)
    negative = LoraWeight(gathered(node.w), a, b, -node.scale, layout=layout)
    return dataclasses.replace(node, w=reshard_like(dense(negative), node.w), a=a, b=b)


def _svd(key: jax.Array, matrix: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    if min(matrix.shape) < SKETCH_FROM:
        return truncated_svd(matrix, rank)
    return randomized_svd(key, matrix, rank, iterations=4)
