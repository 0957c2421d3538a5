"""Learning-rate schedules, and the optimizer of the adapters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optax

import lora_jax as lora
from lora_jax.training.errors import TrainingError
from lora_jax.training.optimizers.kinds import ADAMW, KINDS

SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class Optimizer:
    """An optimizer with clipping and warm-up, for the adapters only.

    Raises:
      TrainingError: a field has an invalid value; the message names it.
    """

    learning_rate: float = 2e-4  # after warm-up
    schedule: str = "cosine"  # "cosine" decays to zero at the last step; or "constant"
    warmup: float = 0.05  # steps; a value below 1 is a fraction of all steps
    clip: float = 1.0  # maximum global norm of the gradients; 0 disables clipping
    weight_decay: float = 0.0
    b_ratio: float = 1.0  # learning rate of B over that of A (LoRA+)
    name: str = ADAMW  # a key of `optimizers.kinds.KINDS`

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise TrainingError(f"schedule must be one of {SCHEDULES}, got {self.schedule!r}")
        if self.name not in KINDS:
            raise TrainingError(f"name must be one of {(*KINDS,)}, got {self.name!r}")
        if self.b_ratio != 1 and KINDS[self.name].on_pairs:
            raise TrainingError(
                f"{self.name} updates A and B together, so B cannot have another learning rate; "
                f"b_ratio must be 1, got {self.b_ratio}"
            )
        for name in ("learning_rate", "b_ratio"):
            if not 0 < getattr(self, name) < float("inf"):
                raise TrainingError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup", "clip", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise TrainingError(f"{name} must not be negative, got {getattr(self, name)}")

    def rates(self, steps: int) -> Callable[[Any], Any]:
        """Return the learning rate as a function of the step, from 0; it is never zero at step 0.

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

    def describe(self, steps: int, done: int) -> str:
        """Return in words what the learning rate does after `done` of `steps` steps.

        >>> Optimizer(1e-3, warmup=0).describe(steps=4, done=2)
        'the learning rate is 5.0e-04 at step 3, and falls to 0 after step 4 (cosine)'
        """
        now = f"the learning rate is {float(self.rates(steps)(done)):.1e} at step {done + 1}"
        if self.schedule == "cosine":
            return f"{now}, and falls to 0 after step {steps} (cosine)"
        return f"{now}, and stays at {self.learning_rate:.1e} after the warm-up (constant)"

    def transformation(self, adapters: Any, steps: int) -> optax.GradientTransformation:
        """Return the optax transformation for adapters, as `lora_jax.split` returns them.

        It changes only A, B, magnitudes and fully trained leaves.
        """
        kind = KINDS[self.name]
        given = (self.rates(steps), self.weight_decay, adapters, self.b_ratio)
        return optax.chain(self.clipping(adapters), kind.transformation(*given))

    def clipping(self, adapters: Any) -> optax.GradientTransformation:
        """Return the clipping of the global norm over everything that trains, in any group."""
        if not self.clip:
            return optax.identity()
        return lora.freeze(optax.clip_by_global_norm(self.clip), adapters)
