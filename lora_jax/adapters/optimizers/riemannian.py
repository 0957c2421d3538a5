"""Gradients of A and B, each preconditioned with the other factor (scaled AdamW, scaled GD)."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from lora_jax.adapters.optimizers.options import check_number
from lora_jax.adapters.optimizers.pairs import Pair, PairRule, trained_pairs
from lora_jax.adapters.optimizers.spectra import eigenvalues, gram, matmul, on_spectrum


def riemannian(
    tx: optax.GradientTransformation, params: Any, damping: Any = 1e-2
) -> optax.GradientTransformationExtraArgs:
    """Apply `tx` to gradients that are preconditioned with the other factor; the rest is frozen.

    Riemannian Preconditioned LoRA, https://arxiv.org/abs/2402.02347: with AdamW inside it is the
    paper's scaled AdamW, with SGD its scaled gradient descent. The gradients become

        ∇A ← ∇A·(B·Bᵀ + δ·I)⁻¹        ∇B ← (Aᵀ·A + δ·I)⁻¹·∇B

    so that a step of gradient descent changes A·B alike however its size is shared out between A
    and B. PEFT's `create_riemannian_optimizer` gives the same numbers for linear layers, and leaves
    embeddings as they are. Here all layouts are preconditioned: the in axes and the out axes of a
    convolution or an attention kernel are flattened, and layers and experts of a stack have one
    matrix each. Gradients of magnitudes, fully trained leaves and rows reach `tx` unchanged.

    Args:
      tx: any optax transformation that needs gradients alone, such as `optax.adamw(1e-3)`. It sees
        float32 numbers where factors have fewer bits.
      params: the tree whose structure the gradients will have, joined or an overlay. `update` needs
        parameters too.
      damping: δ, positive. PEFT has 1e-2. A small value brings out the preconditioner, and makes
        the first steps of A larger, because B is zero initially.

    Raises:
      ConfigError: `damping` is not positive.
      StructureError: nothing in `params` would train, or `update` gets no parameters.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> params = lora_jax.init(jax.random.key(0), {"k": jnp.ones((4, 3))}, lora_jax.LoraConfig(1))
    >>> tx = riemannian(optax.sgd(1.0), params, damping=1.0)
    >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    >>> want = -1 / (1 + (params["k"].a ** 2).sum())
    >>> float(updates["k"].a[0, 0]), bool(jnp.allclose(updates["k"].b, want))  # B·Bᵀ is zero
    (-1.0, True)
    """
    check_number("riemannian", "damping", damping, above=0)

    def update(
        gradients: Pair, factors: Pair, scale: Any, kept: Mapping[str, Pair], count: Any
    ) -> tuple[Pair, dict[str, Pair]]:
        def one(gradient: jax.Array, other: jax.Array) -> jax.Array:
            squares, vectors = eigenvalues(gram(other))
            return matmul(gradient, on_spectrum(1 / (squares + damping), vectors))

        return gradients.map(one, factors.swapped), {}

    return trained_pairs("riemannian", PairRule(update), tx, params)
