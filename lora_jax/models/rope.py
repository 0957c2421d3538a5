"""Rotary position embeddings (Su et al., 2021, https://arxiv.org/abs/2104.09864)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.checks import is_within
from lora_jax.core.foreign import shown_value

ROPE_KINDS = ("default", "linear", "llama3")
#: The smallest and the largest value of each number: beyond them angles are not finite.
_RANGES: dict[str, tuple[float, float]] = {
    "theta": (1.0, 1e15),
    "factor": (0.01, 1e6),
    "low_freq_factor": (1e-6, 1e6),
    "high_freq_factor": (1e-6, 1e6),
    "original_max_position_embeddings": (1, 2**31 - 1),
}


@dataclass(frozen=True)
class Rope:
    """How positions become angles, under the names in `config.json`.

    `linear` divides every frequency by `factor`. `llama3` (Llama 3.1) divides only those of long
    waves, longer than `original_max_position_embeddings / low_freq_factor`, with a smooth
    transition down to `original_max_position_embeddings / high_freq_factor`.

    Raises `ValueError` for a kind that is not in `ROPE_KINDS`, or a number beyond what a model can
    mean: `theta` from 1 to 1e15, `factor` from 0.01 to 1e6, the others positive.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ValueError(
                f"rope_type {shown_value(self.kind)} is not supported, only {', '.join(ROPE_KINDS)}"
            )
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not is_within(value, low, high):
                raise ValueError(
                    f"rope: {name} must be a positive number from {low:g} to {high:g}, "
                    f"got {shown_value(value)}"
                )
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope: high_freq_factor {self.high_freq_factor} must be above "
                f"low_freq_factor {self.low_freq_factor}"
            )

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> "Rope":
        """Read a parsed `config.json` of transformers 4 (`rope_theta`, `rope_scaling`) or 5.

        Raises `ValueError` for what `Rope` refuses, for partial rotation, and for a scaled kind
        whose numbers are missing.
        """
        given = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"rope_scaling must be a mapping, got {shown_value(given)}")
        partial = given.get("partial_rotary_factor", settings.get("partial_rotary_factor")) or 1.0
        if partial != 1.0:
            raise ValueError(f"partial_rotary_factor {shown_value(partial)} is not supported")
        kind = str(given.get("rope_type", given.get("type")) or "default")
        theta = given.get("rope_theta", settings.get("rope_theta", cls.theta))
        numbers = {"default": (), "linear": ("factor",), "llama3": _LLAMA3_NUMBERS}.get(kind, ())
        if missing := [name for name in numbers if name not in given]:
            raise ValueError(f"rope_type {shown_value(kind)} needs {', '.join(missing)}")
        return cls(theta, kind, **{name: given[name] for name in numbers})

    def frequencies(self, size: int) -> np.ndarray:
        """Return the angle per position for each pair in a head: `[size / 2]` float32."""
        frequency = 1 / self.theta ** (np.arange(0, size, 2, dtype=np.float64) / size)
        if self.kind == "linear":
            frequency /= self.factor
        if self.kind == "llama3":
            turns = self.original_max_position_embeddings * frequency / (2 * np.pi)
            low, high = self.low_freq_factor, self.high_freq_factor
            kept = np.clip((turns - low) / (high - low), 0, 1)  # 1: a short wave, unchanged
            frequency *= kept + (1 - kept) / self.factor
        return frequency.astype(np.float32)

    def angles(self, positions: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        """Return cosine and sine for `rotate`: ints `[...]` -> float32 `[..., size / 2]` each."""
        frequencies = jnp.expand_dims(self.frequencies(size), range(positions.ndim))
        angle = positions[..., None].astype(jnp.float32) * frequencies
        return jnp.cos(angle), jnp.sin(angle)


# What the kind `llama3` needs besides theta.
_LLAMA3_NUMBERS = (
    *("factor", "low_freq_factor", "high_freq_factor"),
    "original_max_position_embeddings",
)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate pairs of numbers, paired across the two halves of a head as in Hugging Face.

    Args:
      x: `[batch, length, ..., size]`.
      cos, sin: `[batch or 1, length, size / 2]`, from `Rope.angles`.

    Returns:
      The same shape and dtype as `x`; the arithmetic is in float32.
    """
    middle = (1,) * (x.ndim - cos.ndim)
    cos, sin = (t.reshape(*t.shape[:2], *middle, t.shape[-1]) for t in (cos, sin))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
