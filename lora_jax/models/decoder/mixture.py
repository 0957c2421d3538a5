"""The feed-forward part of a layer whose tokens choose among experts."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.experts import ExpertsConfig, PerExpert, route
from lora_jax.models.decoder.parts import ACTIVATIONS, dense
from lora_jax.models.decoder.router_load import ROUTER, router_load


class MixtureOfExperts(nn.Module):
    """The sum over the chosen experts of share · down(act(gate(x)) · up(x))."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, segments: jax.Array | None = None) -> jax.Array:
        """Map `[batch, length, width]` to the same shape and dtype.

        Args:
          x: the tokens.
          segments: integers `[batch, length]`, 0 at padding, which no `router_load` counts.
        """
        c, experts = self.config, self.config.experts
        assert experts is not None
        tokens = x.reshape(-1, x.shape[-1])
        logits = dense(c, experts.count, experts.bias, "router")(tokens)
        wide = jnp.promote_types(logits.dtype, jnp.float32)
        shares, chosen = route(experts, logits.astype(wide))
        if self.is_mutable_collection(ROUTER) and not self.is_initializing():
            self.sow(ROUTER, "load", router_load(logits.astype(wide), chosen, segments))
        flat = chosen.reshape(-1)  # [tokens · chosen], a token's experts one after another
        order = jnp.argsort(flat)  # rows by expert -> their places in `flat`
        sizes = jnp.bincount(flat, length=experts.count)
        networks = Experts(c, experts, name="experts")
        rows = networks(tokens[order // experts.chosen], flat[order], sizes)
        # back to each token's own experts: [tokens, chosen, width]
        each = rows[jnp.argsort(order)].reshape(len(tokens), experts.chosen, -1)
        mixed = jnp.einsum("tkw,tk->tw", each, shares.astype(each.dtype))
        return mixed.reshape(x.shape)


class Experts(nn.Module):
    """The networks of all experts, on rows that are sorted by expert."""

    config: DecoderConfig
    experts: ExpertsConfig

    @nn.compact
    def __call__(self, x: jax.Array, experts: jax.Array, sizes: jax.Array) -> jax.Array:
        """Map `[rows, width]` to the same shape and dtype; arguments as of `PerExpert`."""
        c, e = self.config, self.experts

        def linear(name: str, features: int, x: jax.Array) -> jax.Array:
            layer = PerExpert(e.count, features, e.bias, c.dtype, c.param_dtype, name=name)
            return layer(x, experts, sizes)

        if e.fused:
            both = linear("gate_up", 2 * e.width, x)
            gate, up = both[..., ::2], both[..., 1::2]
        else:
            gate, up = linear("gate", e.width, x), linear("up", e.width, x)
        return linear("down", c.hidden_size, self._activate(gate, up))

    def _activate(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        alpha, limit = self.experts.alpha, self.experts.limit
        if alpha is None or limit is None:
            return ACTIVATIONS[self.config.hidden_act](gate) * up
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return (up + 1) * (gate * jax.nn.sigmoid(alpha * gate))
