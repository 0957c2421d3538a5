"""Rotary position embeddings (Su et al., 2021, https://arxiv.org/abs/2104.09864)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.checks import is_size, is_within
from lora_jax.core.foreign import shown_value

#: Kind -> what config.json must say of it.
_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "proportional": (),
}
ROPE_KINDS = tuple(_NEEDED)
#: What config.json may say of a kind beside that.
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("beta_fast", "beta_slow", "truncate"),
    "proportional": ("factor",),
}
_OF_A_SHORTER_TRAINING = ("llama3", "yarn", "longrope")
#: The smallest and the largest value of each number: beyond them angles are not finite.
_RANGES: dict[str, tuple[float, float]] = {
    "theta": (1.0, 1e15),
    "factor": (0.01, 1e6),
    "low_freq_factor": (1e-6, 1e6),
    "high_freq_factor": (1e-6, 1e6),
    "original_max_position_embeddings": (1, 2**31 - 1),
    "beta_fast": (1e-6, 1e6),
    "beta_slow": (1e-6, 1e6),
    "attention_factor": (1e-3, 1e3),
    "partial": (1e-3, 1.0),
}


@dataclass(frozen=True)
class Rope:
    """How positions become angles, under the names in `config.json`.

    `linear` divides every frequency by `factor`. `llama3` (Llama 3.1) divides only those of long
    waves, longer than `original_max_position_embeddings / low_freq_factor`, with a smooth
    transition down to `original_max_position_embeddings / high_freq_factor`. `yarn`
    (https://arxiv.org/abs/2309.00071) divides those of waves that turn less than `beta_slow` times
    within the original length, and leaves those that turn more than `beta_fast` times. `longrope`
    (https://arxiv.org/abs/2402.13753) divides each frequency by its own number, `short_factor` or,
    in calls of more than the original length, `long_factor`. `proportional` (Gemma 4) rotates the
    first pairs of the two halves of a head. `dynamic` changes frequencies only
    beyond `max_position_embeddings`, which a model does not reach here.

    Attributes:
      partial: which part of a head is rotated, its first numbers; with `proportional` the first
        of each half.
      attention_factor: cosine and sine are multiplied by it.

    Raises `ValueError` for a kind that is not in `ROPE_KINDS`, or a number beyond what a model can
    mean: `theta` from 1 to 1e15, `factor` from 0.01 to 1e6, the others positive.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float = 1.0
    partial: float = 1.0

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
        if not isinstance(self.truncate, bool):
            raise ValueError(f"rope: truncate must be a bool, got {shown_value(self.truncate)}")

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> "Rope":
        """Read a parsed `config.json` of transformers 4 (`rope_theta`, `rope_scaling`) or 5.

        Raises `ValueError` for what `Rope` refuses, and for a scaled kind whose numbers are
        missing.
        """
        given = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"rope_scaling must be a mapping, got {shown_value(given)}")
        kind = str(given.get("rope_type", given.get("type")) or "default")
        found = {"theta": given.get("rope_theta", settings.get("rope_theta", cls.theta))}
        maybe = {
            "partial": given.get("partial_rotary_factor", settings.get("partial_rotary_factor"))
        }
        if missing := [name for name in _NEEDED.get(kind, ()) if name not in given]:
            raise ValueError(f"rope_type {shown_value(kind)} needs {', '.join(missing)}")
        found |= {name: given[name] for name in _NEEDED.get(kind, ())}
        maybe |= {name: given.get(name) for name in _OPTIONAL.get(kind, ())}
        longest = settings.get("max_position_embeddings")
        original: Any = None
        if kind in _OF_A_SHORTER_TRAINING:
            name = "original_max_position_embeddings"
            maybe[name] = original = settings.get(name) or given.get(name) or longest
        if kind == "longrope":
            found |= {name: _numbers(name, given[name]) for name in _NEEDED[kind]}
        if kind in ("yarn", "longrope"):
            found.setdefault("factor", given.get("factor"))
            if found["factor"] is None:
                found["factor"] = _ratio(longest, original)
            found["attention_factor"] = given.get("attention_factor") or _attention_factor(
                kind, given, found["factor"], original
            )
        given_values = {name: x for name, x in maybe.items() if x is not None}
        return cls(kind=kind, **found, **given_values)

    def rotated(self, size: int) -> int:
        """Return how many numbers of a head of a size are rotated."""
        return size if self.kind == "proportional" else int(size * self.partial)

    def frequencies(self, size: int, *, long: bool = False) -> np.ndarray:
        """Return the angle per position for each pair in a head: `[rotated / 2]` float32.

        Args:
          size: of a head.
          long: whether a call is longer than the original length, for `longrope`.
        """
        rotated = self.rotated(size)
        frequency = 1 / self.theta ** (np.arange(0, rotated, 2, dtype=np.float64) / rotated)
        if self.kind in ("linear", "proportional"):
            frequency /= self.factor
        if self.kind == "proportional":
            frequency[int(self.partial * size // 2) :] = 0
        if self.kind == "llama3":
            turns = self.original_max_position_embeddings * frequency / (2 * np.pi)
            low, high = self.low_freq_factor, self.high_freq_factor
            kept = np.clip((turns - low) / (high - low), 0, 1)  # 1: a short wave, unchanged
            frequency *= kept + (1 - kept) / self.factor
        if self.kind == "yarn":
            kept = 1 - self._ramp(rotated)
            frequency *= kept + (1 - kept) / self.factor
        if self.kind == "longrope":
            factors = self.long_factor if long else self.short_factor
            if len(factors) != len(frequency):
                raise ValueError(
                    f"rope: {'long' if long else 'short'}_factor has {len(factors)} numbers, but "
                    f"{len(frequency)} pairs of a head are rotated"
                )
            frequency /= np.asarray(factors)
        return frequency.astype(np.float32)

    def _ramp(self, rotated: int) -> np.ndarray:
        """Return 0 for the frequencies that YaRN keeps, 1 for those it divides, between 0 to 1."""

        def pair(turns: float) -> float:
            """Return the number of the pair that turns so often within the original length."""
            length = self.original_max_position_embeddings / (turns * 2 * np.pi)
            return rotated * math.log(length) / (2 * math.log(max(self.theta, 1 + 1e-9)))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotated - 1)
        span = high - low or 0.001
        return np.clip((np.arange(rotated // 2) - low) / span, 0, 1)

    def angles(
        self, positions: jax.Array, size: int, reach: int | jax.Array = 0
    ) -> tuple[jax.Array, jax.Array]:
        """Return cosine and sine for `rotate`: ints `[...]` -> float32 `[..., rotated / 2]` each.

        Args:
          positions: of tokens.
          size: of a head.
          reach: how long the texts of a call can become, which `longrope` asks.
        """
        frequencies: Any = self.frequencies(size)
        if self.kind == "longrope":
            is_long = reach > self.original_max_position_embeddings
            long = self.frequencies(size, long=True)
            if isinstance(is_long, bool):
                frequencies = long if is_long else frequencies
            else:
                frequencies = jnp.where(is_long, long, frequencies)
        frequencies = jnp.expand_dims(frequencies, range(positions.ndim))
        angle = positions[..., None].astype(jnp.float32) * frequencies
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return cos, sin


def _numbers(name: str, given: Any) -> tuple[float, ...]:
    low, high = _RANGES["factor"]
    if not isinstance(given, list | tuple) or not all(is_within(x, low, high) for x in given):
        raise ValueError(f"rope: {name} must be a list of positive numbers")
    return tuple(map(float, given))


def _ratio(longest: Any, original: Any) -> float:
    if not is_size(longest) or not is_size(original):
        raise ValueError(
            "rope: max_position_embeddings and original_max_position_embeddings must be positive "
            f"ints, got {shown_value(longest)} and {shown_value(original)}"
        )
    ratio, limits = longest / original, _RANGES["factor"]
    if not is_within(ratio, *limits):
        raise ValueError(
            "rope: max_position_embeddings / original_max_position_embeddings must be from "
            f"{limits[0]:g} to {limits[1]:g}, got {longest} / {original}"
        )
    return ratio


def _attention_factor(kind: str, given: Mapping[str, Any], factor: Any, original: Any) -> float:
    """Return the factor that the papers recommend."""
    if not is_within(factor, *_RANGES["factor"]) or factor <= 1 or not is_size(original):
        return 1.0  # `Rope` refuses other values
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original)) if original > 1 else 1.0
    temperature = lambda scale: 0.1 * scale * math.log(factor) + 1
    scales = [given.get(name) for name in ("mscale", "mscale_all_dim")]
    if all(is_within(x, 1e-3, 1e3) for x in scales):
        return temperature(scales[0]) / temperature(scales[1])
    return temperature(1.0)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate pairs of numbers, paired across two halves as in Hugging Face.

    Args:
      x: `[batch, length, ..., size]`, of which the first `2 * pairs` numbers are rotated.
      cos, sin: `[batch or 1, length, pairs]`, from `Rope.angles`.

    Returns:
      The same shape and dtype as `x`; the arithmetic is in float32.
    """
    rotated = 2 * cos.shape[-1]
    if rotated < x.shape[-1]:
        part = rotate(x[..., :rotated], cos, sin)
        return jnp.concatenate([part, x[..., rotated:]], axis=-1)
    middle = (1,) * (x.ndim - cos.ndim)
    cos, sin = (t.reshape(*t.shape[:2], *middle, t.shape[-1]) for t in (cos, sin))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
