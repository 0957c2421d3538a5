"""The table of optimizers: what each one makes of a learning rate and a weight decay."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import optax

import lora_jax as lora
from lora_jax.training.optimizers.muon import muon

Rate = Any  # a number, an array or an optax schedule


@dataclass(frozen=True)
class Kind:
    """One optimizer.

    Attributes:
      make: `(learning rate, weight decay, adapters) -> transformation`.
      on_pairs: whether it updates A and B of a weight together and freezes what does not train, so
        that B cannot have another rate.
      sees_rank: whether a step depends on the number of columns of A, also of padded ones.
    """

    make: Callable[[Rate, Any, Any], optax.GradientTransformation]
    on_pairs: bool = False
    sees_rank: bool = False

    def transformation(
        self, rate: Rate, weight_decay: Any, adapters: Any, b_ratio: float = 1.0
    ) -> optax.GradientTransformation:
        """Return the transformation of all that trains; everything else is frozen.

        Args:
          rate: the learning rate.
          weight_decay: decoupled, as in AdamW.
          adapters: as `lora_jax.split` returns them.
          b_ratio: learning rate of B over that of A; 1 if the optimizer is `on_pairs`.
        """
        if self.on_pairs:
            return self.make(rate, weight_decay, adapters)
        if b_ratio == 1:
            return lora.freeze(self.make(rate, weight_decay, adapters), adapters)
        one = lambda rate: self.make(rate, weight_decay, adapters)
        return lora.lora_plus(rate, adapters, b_ratio, one)


def _adafactor(rate: Rate, weight_decay: Any, _: Any) -> optax.GradientTransformation:
    """Return Adafactor with learning rates like Adam's, since a B of zeros has no scale yet."""
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
    )


def _sgd(rate: Rate, weight_decay: Any, _: Any) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(rate))


ADAMW = "adamw"
KINDS: Mapping[str, Kind] = {
    ADAMW: Kind(lambda rate, decay, _: optax.adamw(rate, weight_decay=decay)),
    "lion": Kind(lambda rate, decay, _: optax.lion(rate, weight_decay=decay)),
    "muon": Kind(muon, sees_rank=True),
    "adafactor": Kind(_adafactor, sees_rank=True),
    "sgd": Kind(_sgd),
    "lora-rite": Kind(
        lambda rate, decay, params: lora.lora_rite(rate, params, weight_decay=decay), on_pairs=True
    ),
    "lora-muon": Kind(
        lambda rate, decay, params: lora.lora_muon(rate, params, weight_decay=decay), on_pairs=True
    ),
    "riemannian": Kind(
        lambda rate, decay, params: lora.riemannian(optax.adamw(rate, weight_decay=decay), params),
        on_pairs=True,
    ),
}
