"""A mixture of experts: a router, and one feed-forward network per expert.

Tokens are sorted by expert, so that each product is one `ragged_dot` over all experts
(https://arxiv.org/abs/2211.15841): no expert has a capacity, and no token is dropped.
"""

from dataclasses import dataclass

import jax
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import lax

from lora_jax.core.checks import is_size, is_within
from lora_jax.core.foreign import shown_value


@dataclass(frozen=True)
class ExpertsConfig:
    """The experts of each layer.

    Attributes:
      count: number of experts.
      chosen: number of experts that compute a token.
      width: of the hidden units of an expert.
      shares: what weighs the chosen experts: their softmax among all experts ("all"), the same
        divided by its sum ("normalized"), or their softmax among the chosen ("chosen").
      bias: whether router and experts have biases.
      fused: whether gate and up are one parameter, whose outputs alternate (gpt-oss).
      alpha, limit: of gpt-oss' activation (up + 1) · gate · sigmoid(alpha · gate), where gate is at
        most the limit and up between both limits; None for the model's own on gate, times up.

    Raises `ValueError` at construction for a size below one, more chosen experts than there are, or
    unknown `shares`.
    """

    count: int
    chosen: int
    width: int
    shares: str = "all"
    bias: bool = False
    fused: bool = False
    alpha: float | None = None
    limit: float | None = None

    def __post_init__(self) -> None:
        for name in ("count", "chosen", "width"):
            if not is_size(getattr(self, name)):
                value = shown_value(getattr(self, name))
                raise ValueError(f"ExpertsConfig.{name} must be a positive int, got {value}")
        if self.chosen > self.count:
            raise ValueError(
                f"ExpertsConfig: {self.chosen} chosen experts are more than all {self.count}"
            )
        if self.shares not in SHARES:
            raise ValueError(
                f"ExpertsConfig.shares {shown_value(self.shares)} is not one of {SHARES}"
            )
        for name in ("alpha", "limit"):
            value = getattr(self, name)
            if value is not None and not is_within(value, 1e-6, 1e6):
                raise ValueError(
                    f"ExpertsConfig.{name} must be a positive number, got {shown_value(value)}"
                )
        if (self.alpha is None) != (self.limit is None):
            raise ValueError("ExpertsConfig: alpha and limit go together")


SHARES = ("all", "normalized", "chosen")


def route(config: ExpertsConfig, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Choose the experts of each token.

    Args:
      config: of the experts.
      logits: the router's, `[tokens, experts]`.

    Returns:
      Shares in the dtype of `logits`, and the experts' numbers, both `[tokens, chosen]`, the
      largest first.
    """
    if config.shares == "chosen":
        largest, experts = lax.top_k(logits, config.chosen)
        return jax.nn.softmax(largest, axis=-1), experts
    shares, experts = lax.top_k(jax.nn.softmax(logits, axis=-1), config.chosen)
    if config.shares == "normalized":
        shares = shares / shares.sum(-1, keepdims=True)
    return shares, experts


class PerExpert(nn.Module):
    """A linear layer per expert: kernel `[experts, in, out]`, bias `[experts, out]`."""

    experts: int
    features: int
    use_bias: bool
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, experts: jax.Array, sizes: jax.Array) -> jax.Array:
        """Apply to each row its expert.

        Args:
          x: `[rows, in]`, sorted by expert.
          experts: the number of each row's expert, `[rows]`.
          sizes: how many rows each expert has, `[experts]`.

        Returns:
          `[rows, features]`.
        """
        initial = nn.initializers.lecun_normal(batch_axis=0)
        shape = (self.experts, x.shape[-1], self.features)
        kernel = self.param("kernel", initial, shape, self.param_dtype)
        x, kernel = promote_dtype(x, kernel, dtype=self.dtype)
        y = lax.ragged_dot(x, kernel, sizes)
        if not self.use_bias:
            return y
        zeros = nn.initializers.zeros
        bias = self.param("bias", zeros, (self.experts, self.features), self.param_dtype)
        return y + bias.astype(y.dtype)[experts]
