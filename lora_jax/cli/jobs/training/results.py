"""What `lora-jax train` writes and prints at the end: adapters, and a table."""

import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from rich.console import Console
from rich.table import Table

import lora_jax as lora
from lora_jax.cli import sources
from lora_jax.cli.jobs.training.data import Task
from lora_jax.cli.train_options import TrainOptions
from lora_jax.core.foreign import escaped, shown
from lora_jax.files import native, peft
from lora_jax.files.disk import processes
from lora_jax.files.disk.atomic import write_atomically, write_directory
from lora_jax.files.naming import Naming
from lora_jax.training import log

_CHANGES_BASE = ("pissa", "pissa_fast", "olora")  # initializations that change the base
_IN_HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # a directory's name


@dataclass(frozen=True)
class Results:
    """How the adapters of a run are written."""

    options: TrainOptions
    task: Task
    naming: Naming
    config: lora.LoraConfig
    start: Any  # the joined tree before the first step
    tokenizer: Mapping[str, bytes]  # the files of a tokenizer that is not the base's

    @property
    def what(self) -> str:
        """What a run leaves."""
        return "adapter"

    def path(self, name: str) -> Path:
        """Return where adapters are written: a directory, or a classifier's file."""
        return self.options.out / (f"{name}.safetensors" if self.task.prefix else name)

    def check(self, adapters: Any) -> None:
        """Check before the first step that the adapters can be written; nothing stays written.

        Raises:
          LoraError: the format cannot hold them.
        """
        with tempfile.TemporaryDirectory() as scratch:
            self._write(Path(scratch) / "adapter", adapters, {})

    def write(self, name: str, adapters: Any, record: log.Record) -> None:
        """Write adapters for the model as it was published.

        They become a directory of PEFT; for a classifier a file of lora_jax, which also records the
        labels and what its head reads.
        """
        if self.config.init in _CHANGES_BASE:
            adapters = lora.on_original(self.start, adapters, self.task.params)
        self._write(self.path(name), adapters, record)

    def keep_best(self) -> None:
        """Replace the last adapter by a copy of the one with the lowest held-out loss."""
        best, path = self.path("best"), self.path("adapter")
        if best.is_file():
            write_atomically(path, best.read_bytes())
            return
        names = sorted(file.name for file in best.iterdir() if file.name[0] != ".")
        if not peft.may_replace_card(path):
            names = [name for name in names if name != peft.CARD]
        names.sort(key=lambda name: not name.endswith("config.json"))  # without which none is valid
        write_directory(path, {name: partial(_copy, best / name) for name in names})

    def _write(self, path: Path, adapters: Any, record: log.Record) -> None:
        base, name = self.task.params, base_name(self.options)
        if self.task.prefix:
            metadata = {native.MODEL: name, **self.task.metadata, **record}
            lora.save(path, adapters, metadata, base=base, config=self.config)
            return
        peft.save(
            path,
            adapters,
            self.naming,
            base=base,
            config=self.config,
            base_model=name,
            task_type="CAUSAL_LM",
            card=self._card(record),
        )
        processes.by_first(partial(self._write_tokenizer, path))

    def _card(self, record: log.Record) -> peft.ModelCard:
        """Return what the model card says of the training up to a step."""
        figures: dict[str, Any] = {}
        if "step" in record:
            records = log.read_until(self.options.out / "log.jsonl", record["step"])
            _, losses = log.losses(records)
            evaluations = [*log.evaluations(records), *([record] if "eval_loss" in record else [])]
            figures["steps"] = record["step"]
            figures |= {"training loss": losses[-1]} if losses else {}
            last = evaluations[-1] if evaluations else {}
            names = {"eval_loss": "held-out loss", "perplexity": "perplexity"}
            figures |= {name: last[key] for key, name in names.items() if key in last}
        figures |= {"learning rate": self.options.lr, "seed": self.options.seed}
        data = ", ".join(shown(path.name) for path in self.options.data)
        return peft.ModelCard(data=data, figures=figures)

    def _write_tokenizer(self, path: Path) -> None:
        for file, data in self.tokenizer.items():
            write_atomically(path / file, data)

    def show(self, records: list[dict[str, Any]]) -> None:
        """Print the table of a finished run on stdout, the files written, and a next command.

        Args:
          records: the run's log.
        """
        console = Console(highlight=False)
        console.print(_table(records))
        last = next(r["step"] for r in reversed(records) if "loss" in r)
        evaluations = log.evaluations(records)
        use = self.path("adapter")
        lines = [f"wrote {use}: the {self.what} after step {last:,}"]
        if evaluations:
            best = (
                f"the one with the lowest held-out loss, after step {_best(evaluations)['step']:,}"
            )
            if self.options.load_best:
                lines = [f"wrote {use}: {best}"]
            use = self.path("best")
            lines.append(f"wrote {use}: {best}")
        out = self.options.out
        lines += [
            f"wrote {out / 'log.jsonl'}, {out / 'loss.png'}",
            f"next: {self.next_command(use)}",
        ]
        for line in lines:
            console.print(escaped(line), markup=False, soft_wrap=True)

    def next_command(self, adapter: Path) -> str:
        """Return a command that uses the adapter."""
        verb, rest = ("predict", '"..."') if self.task.prefix else ("generate", '--prompt "..."')
        return f"{shlex.join(['lora-jax', verb, *self.next_words(adapter)])} {rest}"

    def next_words(self, path: Path) -> list[str]:
        """Return the options of a command that uses the adapter."""
        words = ["--model", self.options.model, "--adapter", str(path)]
        if self.options.quantize is not None:
            words += ["--quantize", self.options.quantize]
        return words


def _copy(source: Path, target: BinaryIO) -> None:
    with source.open("rb") as file:
        shutil.copyfileobj(file, target)


def _table(records: list[dict[str, Any]]) -> Table:
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
        table.add_row("lowest held-out loss at step", f"{_best(held_out)['step']:,}")
    table.add_row("seconds per step, median", f"{np.median(seconds):.2f}")
    return table


def _best(evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    return min(evaluations, key=lambda record: record["eval_loss"])


def base_name(options: TrainOptions) -> str:
    """Return the name of the base model that others can find: a Hub id where it is known.

    The Hub ids of built-in models and of directories in the Hub's cache are known; any other model
    is named by its absolute path, valid wherever the adapter is read on this machine.
    """
    if options.base_name is not None:
        return options.base_name
    if not os.path.exists(options.model):
        return sources.HUB_IDS.get(options.model, options.model)
    path = Path(os.path.abspath(options.model))
    cached = (_IN_HUB_CACHE.fullmatch(part) for part in path.parts)
    return next((f"{found[1]}/{found[2]}" for found in cached if found), str(path))
