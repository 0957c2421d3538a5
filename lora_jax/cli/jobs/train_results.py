"""What `lora-jax train` writes and prints at the end: adapters, and a table."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import lora_jax as lora
from lora_jax.cli.jobs.train_data import Task
from lora_jax.cli.train_options import TrainOptions
from lora_jax.core.foreign import escaped
from lora_jax.files import native, peft
from lora_jax.files.naming import Naming
from lora_jax.training import log

_CHANGES_BASE = ("pissa", "pissa_fast", "olora")  # initializations that change the base


@dataclass(frozen=True)
class Results:
    """How the adapters of a run are written."""

    options: TrainOptions
    task: Task
    naming: Naming
    config: lora.LoraConfig
    start: Any  # the joined tree before the first step

    def write(self, name: str, adapters: Any, record: log.Record) -> Path:
        """Write adapters for the model as it was published.

        Returns:
          The path: a directory of PEFT; for a classifier a file of lora_jax, because its head reads
          the mean over a text's tokens, and the heads of transformers read the first or last one.
        """
        options, base = self.options, self.task.params
        if self.config.init in _CHANGES_BASE:
            adapters = lora.on_original(self.start, adapters, base)
        if not self.task.prefix:
            path = options.out / name
            peft.save(
                path,
                adapters,
                self.naming,
                base=base,
                config=self.config,
                base_model=_absolute(options.model),
                task_type="CAUSAL_LM",
            )
            return path
        path = options.out / f"{name}.safetensors"
        metadata = {native.MODEL: _absolute(options.model), **self.task.metadata, **record}
        lora.save(path, adapters, metadata, base=base, config=self.config)
        return path


def _absolute(model: str) -> str:
    """Return an absolute path, valid wherever the adapter is read; a name stays a name."""
    return os.path.abspath(model) if os.path.exists(model) else model


def show(records: list[dict[str, Any]], files: Sequence[Path]) -> None:
    """Print the table of a finished run on stdout, and the files written.

    Args:
      records: the run's log.
      files: what it wrote.
    """
    steps, losses = log.losses(records)
    held_out = log.evaluations(records)
    seconds = [record["seconds"] for record in records if "seconds" in record]
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_row("steps", f"{steps[-1]:,}")
    table.add_row("training loss, first and last", f"{losses[0]:.3f} → {losses[-1]:.3f}")
    if held_out:
        is_classifier = "eval_accuracy" in held_out[0]
        name = "eval_accuracy" if is_classifier else "perplexity"
        values = [f"{record[name]:{'.1%' if is_classifier else '.2f'}}" for record in held_out]
        table.add_row(f"held-out {name.removeprefix('eval_')}", f"{values[0]} → {values[-1]}")
        best = min(held_out, key=lambda record: record["eval_loss"])
        table.add_row("lowest held-out loss at step", f"{best['step']:,}")
    table.add_row("seconds per step, median", f"{np.median(seconds):.2f}")
    console = Console(highlight=False)
    console.print(table)
    written = escaped(", ".join(map(str, files)))
    console.print(f"wrote {written}", markup=False, soft_wrap=True)
