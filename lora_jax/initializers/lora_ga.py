"""`lora_ga`: starting values of A and B from the gradient of a loss."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.algebra import dense
from lora_jax.core.checks import is_number
from lora_jax.core.dtypes import accumulator
from lora_jax.core.errors import ConfigError, TargetError
from lora_jax.core.linalg import randomized_svd, truncated_svd
from lora_jax.core.matrices import as_factors, map_matrices
from lora_jax.core.paths import path_key
from lora_jax.core.patterns import Pattern
from lora_jax.core.tree import map_adapted
from lora_jax.core.weights import LoraWeight
from lora_jax.initializers.example_batches import Batch, as_batches, summed
from lora_jax.initializers.untrained import fresh_weights, replaced

#: How large the factors start, by the names of `lora_ga(..., scale=...)`.
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
) -> Any:
    """Start A and B so that their first steps move the weight as full fine-tuning would.

    LoRA-GA (https://arxiv.org/abs/2407.05000): of the gradient G = ∂L/∂W = U·S·Vᵀ, the mean over
    example batches, A gets the first `rank` columns of U and B the next `rank` rows of Vᵀ (in this
    order of axes, `[in, out]`, U is on the side of the inputs), and the base becomes
    W − scale·A·B. A step of SGD on A and B then moves the weight along the best approximation of
    G of rank 2·rank, and before it the function is the same to the rounding of the base.

    Args:
      loss: a function of the base's parameters and of a batch that returns a scalar, the mean over
        the batch; `loss(params, *batch)` is called without adapters.
      params: a tree as `init` returns it: what to adapt, in which layout, at which ranks.
      batches: tuples of the arguments of `loss` after the parameters.
      scale: "stable": A and B are multiplied by `fan_out^¼/√γ`, as the paper and its authors' code
        have it; "unit": columns and rows stay of length one; "peft": as PEFT has it, B alone is,
        and by the singular values too, so that it is as large as the gradient.
      gamma: γ, positive; the larger it is, the smaller A and B start.
      targets: a pattern as in `LoraConfig` over the adapted paths; None for all. The gradients of
        all targeted weights are held at the same time, so where memory is short start them in
        several calls.

    Returns:
      The same tree with new A and B, and a new base, in the base's own dtype, of each target.
      `on_original` makes the trained adapter one for the base as it was.

    Raises:
      ConfigError: there is no batch, `scale` or `gamma` cannot be used, or `loss` is no scalar.
      TargetError: a gradient is zero or not finite, or a weight is too small: two ranks must fit.
      StructureError: `params` holds no adapters or no values, or their update is not zero.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((3, 2))}
    >>> def loss(params, x):
    ...     return (x @ params["kernel"] * jnp.array([[1.0, 2.0]])).sum()
    >>> x = jnp.array([[0.0, 3.0, 0.0]])
    >>> adapted = lora_jax.init(jax.random.key(0), params, lora_jax.LoraConfig(rank=1), loss, x)
    >>> start = lora_ga(loss, adapted, [(x,)], scale="unit")  # the gradient is 3·[0 1 0]ᵀ·[1 2]
    >>> jnp.abs(start["kernel"].a[:, 0]).round(3)
    Array([0., 1., 0.], dtype=float32)
    >>> bool(jnp.allclose(lora_jax.merge(start)["kernel"], params["kernel"]))
    True
    """
    _check(scale, gamma)
    nodes = fresh_weights("lora_ga", params, targets)
    _check_sizes(nodes)
    gradients = _gradients(loss, params, nodes, as_batches("lora_ga", batches))
    _check_gradients(gradients)
    started = {
        path: _started(
            path_key(jax.random.key(0), path), node, gradients[path], scale, float(gamma)
        )
        for path, node in nodes.items()
    }
    return replaced(params, started)


def _check(scale: Any, gamma: Any) -> None:
    if scale not in SCALES:
        raise ConfigError(f"lora_ga: scale must be one of {SCALES}, got {scale!r}")
    if not is_number(gamma) or not 0 < float(gamma) < math.inf:
        raise ConfigError(f"lora_ga: gamma must be a positive number, got {gamma!r}")


def _check_sizes(nodes: Mapping[str, LoraWeight]) -> None:
    problems = []
    for path, node in nodes.items():
        size = min(node.layout.fan_in(node.shape), node.layout.fan_out(node.shape))
        if 2 * node.rank > size:
            problems.append(
                f"{path}: lora_ga takes 2·rank = {2 * node.rank} directions of the gradient, but "
                f"the weight {node.shape} has {size}; lower its rank to {size // 2} or leave it "
                "out of targets="
            )
    if problems:
        raise TargetError("\n".join(problems))


def _check_gradients(gradients: Mapping[str, jax.Array]) -> None:
    sizes = jax.device_get({path: jnp.abs(x).max() for path, x in gradients.items()})
    problems = [
        f"{path}: the loss does not depend on it"
        if size == 0
        else f"{path}: the gradient of the loss holds NaN or infinity"
        for path, size in sizes.items()
        if size == 0 or not math.isfinite(size)
    ]
    if problems:
        raise TargetError("lora_ga: no direction to start from\n" + "\n".join(problems))


def _gradients(
    loss: Callable, params: Any, nodes: Mapping[str, LoraWeight], batches: list[Batch]
) -> dict[str, jax.Array]:
    """∂L/∂W of each of `nodes` by path, the mean over batches, in float32 (float64 where W is)."""

    def gradient(weights: dict[str, jax.Array], params: Any, *batch: Any) -> dict[str, jax.Array]:
        def of_weights(weights: dict[str, jax.Array]) -> jax.Array:
            plain = map_adapted(
                lambda path, node: weights[path] if path in weights else dense(node), params
            )
            value = loss(plain, *batch)
            if jnp.shape(value) or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
                raise ConfigError(
                    "lora_ga: the loss must be a floating scalar, got "
                    f"{jnp.result_type(value)}{list(jnp.shape(value))}"
                )
            return value

        found = jax.grad(of_weights)(weights)
        return {path: g.astype(accumulator(g.dtype)) for path, g in found.items()}

    weights = {path: node.w for path, node in nodes.items()}
    total = summed(gradient, (weights, params), batches)
    return {path: g / len(batches) for path, g in total.items()}


@functools.partial(jax.jit, static_argnames=("scale", "gamma"))
def _started(
    key: jax.Array, node: LoraWeight, gradient: jax.Array, scale: str, gamma: float
) -> LoraWeight:
    """The node with factors from its gradient, and what they add to the weight taken out of it."""
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
    a, b = a.astype(node.a.dtype), b.astype(node.b.dtype)
    # The update as it is in effect, of factors rounded to their dtype, is what goes out of W.
    negative = LoraWeight(node.w, a, b, -node.scale, layout=layout)
    return dataclasses.replace(node, w=dense(negative), a=a, b=b)


def _svd(key: jax.Array, matrix: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    if min(matrix.shape) < SKETCH_FROM:
        return truncated_svd(matrix, rank)
    return randomized_svd(key, matrix, rank, iterations=4)
