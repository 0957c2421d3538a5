"""LoRA-Muon: a step of the weight whose spectral norm is the learning rate."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.adapters.optimizers.options import check_number
from lora_jax.adapters.optimizers.pairs import Pair, PairRule, trained_pairs
from lora_jax.adapters.optimizers.spectra import inverse_root, matmul, matrix_sign
from lora_jax.core.checks import is_number
from lora_jax.core.errors import ConfigError


def lora_muon(
    learning_rate: Any,
    params: Any,
    *,
    momentum: Any = 0.95,
    weight_decay: Any = 0.0,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Update A and B so that each moves the weight by η/2 in spectral norm; the rest is frozen.

    LoRA-Muon, https://arxiv.org/abs/2606.12921: the steepest descent of
    ⟨∇W, s·(dA·B + A·dB)⟩ where ‖s·dA·B‖ ≤ η/2 and ‖s·A·dB‖ ≤ η/2 in spectral norm, for
    ΔW = s·A·B. With averages M of the gradients it is

        dA = -η/(2s)·msign(M_A·R_B)·R_B,  R_B = (B·Bᵀ)^(-1/2)
        dB = -η/(2s)·R_A·msign(R_A·M_B),  R_A = (Aᵀ·A)^(-1/2)

    where msign sets all singular values to 1. So the first-order change of the weight has a norm
    from η/2 to η, whatever the rank, the scale and the sizes of A and B. Its Frobenius norm does
    grow with the rank. Decay is split between the factors: with q = √(1 - η·λ), A becomes
    q·A + dA/q and B likewise, so that A·B decays by 1 - η·λ and the step keeps its size.

    The formulas are those that an author of the paper restates
    (https://leloykun.github.io/ponder/lora-muon-ogd/) and a summary of the algorithm; the paper
    itself was not at hand. Two things here were derived: s, which the paper has in A or B; and
    what happens without full rank. msign and R come from eigenvectors of rank × rank matrices, not
    from Muon's polynomials, with singular values damped below 1/1000 of the largest. The R of a
    zero factor is zero, so A starts to move at the second step.

    Args:
      learning_rate: η in units of the weight, a number, an array or an optax schedule. Muon's
        factor for the shape of a weight is not in it.
      params: the tree whose structure the gradients will have, joined or an overlay. `update` needs
        parameters too, and `scale` among them: this transformation freezes what does not train, and
        cannot be within `freeze` or `groups`.
      momentum: the decay of M.
      weight_decay: λ, of the product; the learning rate times it is below 1.
      rest: the transformation for magnitudes, fully trained leaves and rows; None means
        `optax.adam(learning_rate)`. Their best rate is often smaller.

    Raises:
      ConfigError: an option has an invalid value.
      StructureError: nothing in `params` would train, or `update` gets no parameters or no scales.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> params = lora_jax.init(jax.random.key(0), {"k": jnp.ones((4, 3))}, lora_jax.LoraConfig(2))
    >>> tx = lora_muon(0.1, params)
    >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    >>> change = params["k"].scale * params["k"].a @ updates["k"].b
    >>> round(float(jnp.linalg.norm(change, 2)), 4)  # A·dB alone: B is zero
    0.05
    """
    check_number("lora_muon", "momentum", momentum, below=1)
    check_number("lora_muon", "weight_decay", weight_decay)
    if is_number(learning_rate) and is_number(weight_decay) and learning_rate * weight_decay >= 1:
        raise ConfigError(
            f"lora_muon: learning_rate times weight_decay must be below 1, got {learning_rate!r} "
            f"and {weight_decay!r}"
        )

    def update(
        gradients: Pair, factors: Pair, scale: Any, kept: Mapping[str, Pair], count: Any
    ) -> tuple[Pair, dict[str, Pair]]:
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        averages = kept["mu"].map(lambda m, g: momentum * m + (1 - momentum) * g, gradients)
        shrink = jnp.sqrt(1 - rate * jnp.asarray(weight_decay, factors.a.dtype))
        half = _inverse(scale.astype(factors.a.dtype)) * rate / (2 * shrink)

        def one(average: jax.Array, factor: jax.Array, other: jax.Array) -> jax.Array:
            root = inverse_root(other)
            step = matmul(matrix_sign(matmul(average, root)), root)
            return (shrink - 1) * factor - half[..., None, None] * step

        return averages.map(one, factors, factors.swapped), {"mu": averages}

    init = lambda factors: {"mu": factors.map(jnp.zeros_like)}
    rule = PairRule(update, init, uses_scale=True)
    rest = rest or optax.adam(learning_rate)
    return trained_pairs("lora_muon", rule, optax.identity(), params, rest)


def _inverse(scale: jax.Array) -> jax.Array:
    """Return 1/|scale|, and 0 where it is 0: nothing moves where an adapter is off."""
    size = jnp.abs(scale)
    return jnp.where(size > 0, 1 / jnp.where(size > 0, size, jnp.ones_like(size)), size)
