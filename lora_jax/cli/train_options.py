"""What the command line of `lora-jax train` says, as one value."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lora_jax.training.optimizer import Optimizer

CAUSAL_LM, CLASSIFICATION = "causal-lm", "classification"


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line, checked by typer."""

    model: str
    data: tuple[Path, ...]
    held_out: tuple[Path, ...]
    eval_split: float
    eval_rows: int
    encoding: str
    out: Path
    resume: bool
    task: str
    targets: tuple[str, ...]
    config: dict[str, Any]  # the fields of `LoraConfig` but for targets
    optimizer: Optimizer
    steps: int | None
    epochs: float
    rows: int
    accumulate: int
    length: int  # 0: 512, or the most that the model takes
    eval_every: int
    save_every: int
    seed: int
    shuffle: bool
    dtype: str | None
    scan: bool
