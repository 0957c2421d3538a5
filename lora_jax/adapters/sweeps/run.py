"""`Run`: one configuration of a sweep, and `grid`, which makes many."""

import dataclasses
import difflib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.core.checks import is_integer, is_number
from lora_jax.core.config import LoraConfig
from lora_jax.core.errors import ConfigError
from lora_jax.core.foreign import shown

#: Initial values that change the base, which all runs of a sweep share.
_CHANGES_BASE = ("pissa", "pissa_fast", "olora", "loftq")
#: The fields that replace those of the sweep's `LoraConfig`.
_OF_CONFIG = ("rank", "alpha", "dropout", "init", "scaling", "dora")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One configuration of a sweep; a field that is None is as in the sweep's `LoraConfig`.

    Args:
      learning_rate: the rate of A and of all that trains but B; positive. Where the sweep has a
        schedule, its value is a multiple of this rate.
      rank: as in `LoraConfig`.
      alpha: as in `LoraConfig`.
      weight_decay: what the optimizer gets as `weight_decay`.
      dropout: as in `LoraConfig`; each step draws its own mask.
      seed: the run starts as `init(jax.random.key(seed), ...)` starts, and drops inputs in step n
        with the key `jax.random.fold_in(jax.random.key(seed), n)`; from 0 to 2³¹ - 1.
      init: "kaiming", "gaussian", "orthogonal" or a function, as in `LoraConfig`. It must leave the
        base as it is, because the runs share it.
      scaling: "standard" or "rslora".
      dora: whether the adapters have magnitudes.
      b_ratio: the learning rate of B over that of A (LoRA+, https://arxiv.org/abs/2402.12354).
      clip: the maximum of the global norm of this run's gradients; 0 disables clipping.
      options: further numbers for the optimizer by name, such as `{"b1": 0.8}`; the same names in
        all runs of a sweep.

    Raises:
      ConfigError: a field has a value without meaning; the message names it.

    >>> Run(rank=4, learning_rate=1e-3).rank
    4
    """

    learning_rate: float
    rank: int | None = None
    alpha: float | None = None
    weight_decay: float = 0.0
    dropout: float | None = None
    seed: int = 0
    init: str | Callable[..., Any] | None = None
    scaling: str | None = None
    dora: bool | None = None
    b_ratio: float = 1.0
    clip: float = 0.0
    options: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("learning_rate", "b_ratio"):
            if not _is_finite(getattr(self, name)) or getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be a positive number, got {getattr(self, name)!r}")
        for name in ("weight_decay", "clip"):
            if not _is_finite(getattr(self, name)) or getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)!r}")
        if not is_integer(self.seed) or not 0 <= self.seed < 2**31:
            raise ConfigError(f"seed must be an integer from 0 to 2**31 - 1, got {self.seed!r}")
        if not isinstance(self.options, Mapping) or not all(map(_is_finite, self.options.values())):
            raise ConfigError(f"options must be numbers by name, got {self.options!r}")
        self.config(LoraConfig())

    def config(self, config: LoraConfig) -> LoraConfig:
        """Return the configuration of this run alone, for `init`, from that of the sweep."""
        own = {name: x for name in _OF_CONFIG if (x := getattr(self, name)) is not None}
        made = dataclasses.replace(config, **own)
        if made.init in _CHANGES_BASE:
            raise ConfigError(
                f"init={made.init!r} changes the base, which all runs of a sweep share: use "
                '"kaiming", "gaussian" or "orthogonal", or train this run by itself'
            )
        return made


def _is_finite(x: Any) -> bool:
    return is_number(x) and math.isfinite(x)


def grid(**fields: Any) -> list[Run]:
    """Return a `Run` for every combination of the values that are listed.

    Args:
      **fields: the fields of `Run`. A list, tuple or array is an axis of the grid; anything else is
        the value of all runs. The first axis varies slowest.

    Raises:
      ConfigError: a field is unknown or without values, or a value has no meaning.

    >>> [(run.rank, run.learning_rate) for run in grid(rank=[4, 16], learning_rate=[1e-3, 1e-2])]
    [(4, 0.001), (4, 0.01), (16, 0.001), (16, 0.01)]
    """
    known = [field.name for field in dataclasses.fields(Run)]
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"did you mean {near[0]}?" if near else "the fields are " + ", ".join(known)
            raise ConfigError(f"grid: a run has no field {shown(name)}; {meant}")
    if "learning_rate" not in fields:
        raise ConfigError("grid: pass learning_rate=, a number or a list of them")
    axes = {name: _axis(value) for name, value in fields.items()}
    empty = [name for name, values in axes.items() if not values]
    if empty:
        raise ConfigError(f"grid: {', '.join(empty)} has no values")
    combinations = itertools.product(*axes.values())
    return [Run(**dict(zip(axes, values, strict=True))) for values in combinations]


def _axis(value: Any) -> list[Any]:
    if isinstance(value, np.ndarray):
        return value.ravel().tolist()
    is_axis = isinstance(value, Sequence) and not isinstance(value, str)
    return list(value) if is_axis else [value]
