"""LoRA-RITE: Adam in a basis that does not depend on how a product is split into A and B."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax.adapters.optimizers.options import check_number
from lora_jax.adapters.optimizers.pairs import Pair, PairRule, trained_pairs
from lora_jax.adapters.optimizers.spectra import (
    add_diagonal,
    eigenvalues,
    gram,
    matmul,
    on_spectrum,
    orthonormal_basis,
    transposed,
)


def lora_rite(
    learning_rate: Any,
    params: Any,
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-6,
    weight_decay: Any = 0.0,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Update A·B alike for any factors of the same product (LoRA-RITE); the rest is frozen.

    LoRA Done RITE, https://arxiv.org/abs/2410.20625. Adam's steps depend on how A·B is split: for
    (A·R, R⁻¹·B) they differ. LoRA-RITE's do not, for any invertible R. With B = T_B⁻¹·Uᵀ, where the
    rows of Uᵀ are orthonormal, a step of A is

        ḡ ← ∇A·T_B                      the unmagnified gradient, [in, rank]
        P ← Uᵀ·U_before                 from the basis of the last step to this one
        ρ ← β₂·(ρ + lost)               lost: the largest fall of an eigenvalue from V to P·V·Pᵀ
        V ← β₂·P·V·Pᵀ + (1 - β₂)·ḡᵀ·ḡ/in
        M ← β₁·M·Pᵀ + (1 - β₁)·ḡ·((V + ρ·I)^(1/2) + ε·I)⁻¹
        A ← A - η·M·T_Bᵀ

    and B's is the same with A and B exchanged, from the same A and B. β₁ and β₂ are corrected for
    their start at zero as Adam's are. The formulas are the paper's, and the mean over rows and ε
    those of its authors' PyTorch implementation (gkevinyen5418/LoRA-RITE), whose clipping is left
    to a chain. Directions in which a factor has less than 1/1000 of its largest singular value are
    left out until they grow: there T has no bound. So A starts to move at the second step.

    Each entry of M is about 1, so η is of the size of Adam's. `scale` multiplies the step of the
    weight, as with other optimizers.

    Args:
      learning_rate: η, a number, an array or an optax schedule.
      params: the tree whose structure the gradients will have, joined or an overlay. `update` needs
        parameters too.
      b1: β₁, the decay of the first moment.
      b2: β₂, the decay of the second moment.
      eps: ε.
      weight_decay: as in AdamW. It decays A and B, and so keeps the invariance only as far as it
        leaves A·B.
      rest: the transformation for magnitudes, fully trained leaves and rows; None means
        `optax.adam(learning_rate)`.

    Raises:
      ConfigError: an option has an invalid value.
      StructureError: nothing in `params` would train, or `update` gets no parameters.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> params = lora_jax.init(jax.random.key(0), {"k": jnp.ones((4, 3))}, lora_jax.LoraConfig(1))
    >>> tx = lora_rite(0.1, params)
    >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    >>> round(float(jnp.linalg.norm(params["k"].a @ updates["k"].b)), 4)  # 0.1·√3: 3 outputs
    0.1732
    """
    for name, value in (("b1", b1), ("b2", b2)):
        check_number("lora_rite", name, value, below=1)
    check_number("lora_rite", "eps", eps, above=0)
    check_number("lora_rite", "weight_decay", weight_decay)

    def init(factors: Pair) -> dict[str, Pair]:
        return _by_name(factors.map(_start, factors.swapped))

    def update(
        gradients: Pair, factors: Pair, scale: Any, kept: Mapping[str, Pair], count: Any
    ) -> tuple[Pair, dict[str, Pair]]:
        decays = corrected(b1, count), corrected(b2, count)

        def one(gradient: jax.Array, other: jax.Array, before: Side) -> tuple[jax.Array, Side]:
            return _step(gradient, other, before, *decays, eps)

        made = gradients.map(one, factors.swapped, _sides(kept))
        return made.map(lambda x: x[0]), _by_name(made.map(lambda x: x[1]))

    after = optax.chain(
        optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(learning_rate)
    )
    rule = PairRule(update, init)
    return trained_pairs("lora_rite", rule, after, params, rest or optax.adam(learning_rate))


class Side(NamedTuple):
    """What is kept of one factor, in the basis U of the other."""

    mu: Any  # [*batch, rows, rank]: M, the first moment
    nu: Any  # [*batch, rank, rank]: V, the second moment
    lost: Any  # [*batch]: ρ
    basis: Any  # [*batch, rows of the other factor, rank]: U of the last step


def _start(factor: jax.Array, other: jax.Array) -> Side:
    nu = jnp.zeros_like(gram(factor))
    return Side(jnp.zeros_like(factor), nu, nu[..., 0, 0], jnp.zeros_like(other))


def _by_name(sides: Pair) -> dict[str, Pair]:
    return {name: sides.map(lambda side, i=i: side[i]) for i, name in enumerate(Side._fields)}


def _sides(kept: Mapping[str, Pair]) -> Pair:
    return Pair(*(Side(*(kept[name][i] for name in Side._fields)) for i in range(2)))


def _step(
    gradient: jax.Array, other: jax.Array, before: Side, b1: Any, b2: Any, eps: Any
) -> tuple[jax.Array, Side]:
    """Return the step of one factor before η, `[*batch, rows, rank]`, and what to keep."""
    basis, t, there = orthonormal_basis(other)
    unmagnified = matmul(gradient, t)
    # Carry the moments to the basis of this step.
    carry = matmul(transposed(basis), before.basis)
    carried = matmul(matmul(carry, before.nu), transposed(carry))
    old, new = eigenvalues(jnp.stack([before.nu, carried]))[0]
    lost = b2 * (before.lost + jnp.maximum((old - new).max(-1), 0))
    nu = b2 * carried + (1 - b2) * gram(unmagnified) / gradient.shape[-2]
    nu = (nu + transposed(nu)) / 2
    # Precondition. Columns that are not there get a value among the others, which moves nothing.
    size = jnp.trace(nu, axis1=-2, axis2=-1)[..., None]
    filled = add_diagonal(nu, jnp.where(there, jnp.zeros_like(size), size))
    squares, vectors = eigenvalues(filled)
    roots = jnp.sqrt(squares + lost[..., None])
    direction = matmul(unmagnified, on_spectrum(1 / (roots + eps), vectors))
    mu = b1 * matmul(before.mu, transposed(carry)) + (1 - b1) * direction
    return matmul(mu, transposed(t)), Side(mu, nu, lost, basis)


def corrected(decay: Any, count: Any) -> Any:
    """Return the decay for which an average of `count + 1` values has weights of sum 1.

    A moment that starts at zero and decays by β·(1 - βᵗ)/(1 - βᵗ⁺¹) at step t equals the moment
    that decays by β, divided by 1 - βᵗ⁺¹ as Adam does it.

    >>> [round(float(corrected(0.5, t)), 4) for t in range(3)]
    [0.0, 0.3333, 0.4286]
    """
    return decay * (1 - decay**count) / (1 - decay ** (count + 1))
