"""Learning rates over the steps, and the optimizer of the adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optax

import lora_jax as lora
from lora_jax.training.errors import TrainingError

SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class Optimizer:
    """AdamW (https://arxiv.org/abs/1711.05101) with a warm-up, for adapters alone.

    Raises:
      TrainingError: a field has a value that cannot be used; the message names it.
    """

    learning_rate: float = 2e-4  # at its highest
    schedule: str = "cosine"  # "cosine" falls to zero with the last step, "constant" stays
    warmup: float = 0.05  # steps of rising rate; below 1 a share of all steps
    clip: float = 1.0  # the gradients' global norm at most; 0 clips nothing
    weight_decay: float = 0.0
    b_ratio: float = 1.0  # B learns so many times faster than A (LoRA+)

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise TrainingError(f"schedule must be one of {SCHEDULES}, got {self.schedule!r}")
        for name in ("learning_rate", "b_ratio"):
            if not 0 < getattr(self, name) < float("inf"):
                raise TrainingError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup", "clip", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise TrainingError(f"{name} must not be negative, got {getattr(self, name)}")

    def rates(self, steps: int) -> Callable[[Any], Any]:
        """The learning rate of step 0, 1, ...; the first step has a rate above zero already.

        >>> rates = Optimizer(1.0, warmup=3).rates(steps=11)
        >>> [round(float(rates(step)), 3) for step in (0, 1, 2, 3, 7, 11)]
        [0.25, 0.5, 0.75, 1.0, 0.5, 0.0]
        """
        warmup = int(self.warmup if self.warmup >= 1 else self.warmup * steps)
        warmup = min(warmup, steps - 1)
        rising = optax.linear_schedule(
            self.learning_rate / (warmup + 1), self.learning_rate, max(1, warmup)
        )
        falling = optax.cosine_decay_schedule(self.learning_rate, steps - warmup)
        after = (
            falling if self.schedule == "cosine" else optax.constant_schedule(self.learning_rate)
        )
        return optax.join_schedules([rising, after], [warmup]) if warmup else after

    def transformation(self, adapters: Any, steps: int) -> optax.GradientTransformation:
        """The optax transformation for an overlay of adapters; all but A, B, magnitudes and the
        leaves trained whole stays as it is."""
        adamw = lambda rate: optax.adamw(rate, weight_decay=self.weight_decay)
        rates = self.rates(steps)
        if self.b_ratio == 1:
            inner = lora.freeze(adamw(rates), adapters)
        else:
            inner = lora.lora_plus(rates, adapters, self.b_ratio, adamw)
        return optax.chain(self.clipping(adapters), inner)

    def clipping(self, adapters: Any) -> optax.GradientTransformation:
        """What bounds the global norm of all that trains, whatever groups it is in."""
        if not self.clip:
            return optax.identity()
        return lora.freeze(optax.clip_by_global_norm(self.clip), adapters)
