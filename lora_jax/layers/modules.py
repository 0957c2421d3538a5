"""The layers as Flax Linen modules: settings are fields, and parameters are those of `init`.

A network of them runs with its own `apply`, adapted or merged, and also inside `lora_jax.lora`.
Under `nn.scan` or `nn.vmap` use plain layers and `lora_jax.init` instead, which sees the stacked
axis. The rest of `lora_jax` rejects stacked parameters of these modules.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_jax.core.errors import StructureError
from lora_jax.layers import embedding, linear, low_rank


class Lora(nn.Module):
    """A linear map of low rank without a base weight, y = x · A · B · alpha/r, like Zeta's `Lora`.

    Args:
      dim: the number of input features.
      dim_out: the number of output features.
      r: the rank.
      alpha: numerator of the scale; None means 1.
      train_alpha: whether alpha is a parameter too.
      dtype: the dtype of A and B.

    >>> import jax, jax.numpy as jnp
    >>> model, x = Lora(dim=128, dim_out=64, r=16, alpha=0.1), jnp.ones((32, 128))
    >>> variables = model.init(jax.random.key(0), x)
    >>> model.apply(variables, x).shape, model.apply(variables, method="weight").shape
    ((32, 64), (128, 64))
    """

    dim: int
    dim_out: int
    r: int = 8
    alpha: float | None = None
    train_alpha: bool = False
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.factors = _params(
            self,
            lambda key: low_rank.init(
                key,
                self.dim,
                self.dim_out,
                self.r,
                self.alpha,
                train_alpha=self.train_alpha,
                dtype=self.dtype,
            ),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[..., dim]` to `[..., dim_out]`; see `low_rank.apply`."""
        return low_rank.apply(self.factors, x, self.alpha)

    def weight(self) -> jax.Array:
        """Return the dense matrix of the map, `[dim, dim_out]`."""
        return low_rank.weight(self.factors, self.alpha)


class LinearWithLoRA(nn.Module):
    """A linear layer with an adapter: y = x·W + (x·A)·(alpha/rank·B) + bias.

    Dropout of the adapter's inputs is on if `apply` gets `rngs={"dropout": key}`, else off.

    Args:
      fan_in: the number of input features.
      fan_out: the number of output features.
      rank: the rank; 0 makes a plain layer.
      alpha: numerator of the scale alpha/rank; None means alpha = rank.
      bias: whether the layer has a bias.
      dropout: the rate at which inputs of the adapter are dropped.
      dtype: the dtype of W and the bias.

    >>> import jax, jax.numpy as jnp
    >>> model, x = LinearWithLoRA(fan_in=8, fan_out=4, rank=2, alpha=4), jnp.ones((3, 8))
    >>> variables = model.init(jax.random.key(0), x)
    >>> model.apply(variables, x).shape
    (3, 4)
    """

    fan_in: int
    fan_out: int
    rank: int
    alpha: float | None = 1.0
    bias: bool = True
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[..., fan_in]` to `[..., fan_out]`; see `linear.apply`."""
        params = _params(
            self,
            lambda key: linear.init(
                key,
                self.fan_in,
                self.fan_out,
                self.rank,
                self.alpha,
                bias=self.bias,
                dropout=self.dropout,
                dtype=self.dtype,
            ),
        )
        drops = self.dropout > 0 and self.has_rng("dropout")
        return linear.apply(params, x, self.make_rng("dropout") if drops else None)


class Embedding(nn.Module):
    """An embedding with an adapter and the options of `torch.nn.Embedding`.

    For sparse gradients see `take_rows`; its rows take the place of the parameters.

    Args:
      vocab_size: the number of rows.
      embed_dim: the number of features per row.
      rank: the rank; 0 makes a plain table.
      alpha: numerator of the scale alpha/rank; None means alpha = rank.
      padding_idx: the id of padding, whose embedding is zero and gets no gradient; negative ids
        count from the end.
      max_norm: the largest norm of a returned row.
      norm_type: the p of that p-norm.
      scale_grad_by_freq: whether to divide the gradient of a row by how often its id occurs.
      dtype: the dtype of W.

    >>> import jax, jax.numpy as jnp
    >>> model, ids = Embedding(vocab_size=50, embed_dim=4, rank=2, padding_idx=0), jnp.arange(3)
    >>> variables = model.init(jax.random.key(0), ids)
    >>> model.apply(variables, ids)[0]
    Array([0., 0., 0., 0.], dtype=float32)
    """

    vocab_size: int
    embed_dim: int
    rank: int
    alpha: float | None = 1.0
    padding_idx: int | None = None
    max_norm: float | None = None
    norm_type: float = 2.0
    scale_grad_by_freq: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array, at: jax.Array | None = None) -> jax.Array:
        """Map ids `[...]` to `[..., embed_dim]`; see `embedding.apply`, also for `at`."""
        return embedding.apply(
            self._whole() if at is None else self._rows(),
            ids,
            padding_idx=embedding.padding_row(self.padding_idx, self.vocab_size),
            max_norm=self.max_norm,
            norm_type=self.norm_type,
            scale_grad_by_freq=self.scale_grad_by_freq,
            at=at,
        )

    def _whole(self) -> embedding.Params:
        return _params(
            self,
            lambda key: embedding.init(
                key,
                self.vocab_size,
                self.embed_dim,
                self.rank,
                self.alpha,
                padding_idx=self.padding_idx,
                dtype=self.dtype,
            ),
        )

    def _rows(self) -> embedding.Params:
        """Return the parameters without Flax's check against the shape of the whole table."""
        if not self.has_variable("params", "embedding"):
            raise StructureError("Embedding: `at` needs rows from take_rows, so init cannot use it")
        return {"embedding": self.get_variable("params", "embedding")}


def _params(module: nn.Module, initialize: Callable[[jax.Array], Any]) -> dict[str, Any]:
    """Make a parameter of the module for each entry of the tree `initialize(key)`."""
    names = jax.eval_shape(initialize, jax.random.key(0))
    return {name: module.param(name, lambda key, n=name: initialize(key)[n]) for name in names}
