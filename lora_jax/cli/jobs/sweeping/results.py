"""What `lora-jax sweep` writes and prints at the end: adapters, pictures and a table."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lora_jax.cli.jobs.training.results import Results
from lora_jax.cli.sweep_lists import Settings
from lora_jax.cli.sweep_options import SweepOptions
from lora_jax.core.foreign import escaped
from lora_jax.files.disk.atomic import write_atomically
from lora_jax.training import log
from lora_jax.training.errors import TrainingError
from lora_jax.training.sweeping import pictures
from lora_jax.training.sweeping.comparison import DIVERGED, DONE, STOPPED, Result, results
from lora_jax.training.sweeping.names import in_short, varies

_HEADS = {
    "rank": "rank",
    "alpha": "alpha",
    "lr": "rate",
    "weight_decay": "decay",
    "dropout": "dropout",
    "seed": "seed",
}


@dataclass(frozen=True)
class SweepResults:
    """The runs of a sweep by name, and how the adapter of each is written."""

    options: SweepOptions
    settings: Mapping[str, Settings]
    writers: Mapping[str, Results]

    def path(self, name: str) -> Path:
        """Return where the adapter of a run is written."""
        return self.writers[name].path("adapter")

    def write(self, name: str, adapters: Any) -> None:
        """Write the adapter of a run, as `lora-jax train` writes it."""
        self.writers[name].write("adapter", adapters, {})

    def finish(self, records: Sequence[log.Record]) -> list[Path]:
        """Write the pictures and `results.json`, and return their paths."""
        found = results([*self.settings], records)
        out, model = self.options.out, self.options.model
        written = [out / "results.json", out / "losses.png"]
        losses = pictures.plot_losses(found, records, f"{model}: {len(found)} runs")
        pictures.draw(losses, out / "losses.png")
        if all(varies([*self.settings.values()], name) for name in ("rank", "lr")):
            pictures.draw(pictures.plot_map(found, self.settings, model), out / "map.png")
            written.append(out / "map.png")
        data = {"best": _best(found), "runs": [self._in_json(one) for one in found]}
        write_atomically(written[0], (json.dumps(data, indent=1) + "\n").encode())
        return written

    def show(self, records: Sequence[log.Record], written: Sequence[Path]) -> None:
        """Print the table of the runs on stdout, the files written, and a next command.

        Raises:
          TrainingError: all runs diverged.
        """
        console = Console(highlight=False)
        found = results([*self.settings], records)
        console.print(self._table(found))
        lines = [f"wrote {', '.join(map(str, [*written, self.options.out / 'log.jsonl']))}"]
        best = _best(found)
        if best is not None:
            lines += [
                f"wrote the adapters into {self.options.out}/NAME/{self.path(best).name}",
                f"best: {best}",
                f"next: {self.writers[best].next_command(self.path(best))}",
            ]
        for line in lines:
            console.print(escaped(line), markup=False, soft_wrap=True)
        if best is None:
            raise TrainingError(
                "all runs diverged; lower the learning rates (--lrs), lengthen the warm-up "
                "(--warmup) or use float32 (--dtype float32)"
            )

    def _in_json(self, one: Result) -> dict[str, Any]:
        finite = lambda x: x if x is not None and math.isfinite(x) else None
        is_written = self.path(one.name).exists()
        return {
            "name": one.name,
            **self.settings[one.name],
            "state": one.state,
            "steps": one.steps,
            "loss": finite(one.loss),
            "eval_loss": finite(one.eval_loss),
            **({} if one.eval_accuracy is None else {"eval_accuracy": one.eval_accuracy}),
            "adapter": str(self.path(one.name)) if is_written else None,
        }

    def _table(self, found: Sequence[Result]) -> Table:
        settings = [*self.settings.values()]
        shown = [n for n in _HEADS if n in ("rank", "lr") or varies(settings, n)]
        columns = {
            **{_HEADS[n]: [in_short(self.settings[one.name][n]) for one in found] for n in shown},
            "training loss": [_loss(one.loss) for one in found],
        }
        if any(one.eval_loss is not None for one in found):
            columns["held-out loss"] = [_loss(one.eval_loss) for one in found]
            is_classifier = any(one.eval_accuracy is not None for one in found)
            columns["accuracy" if is_classifier else "perplexity"] = [
                _accuracy(one) if is_classifier else _perplexity(one) for one in found
            ]
        if any(one.state not in (DONE, None) for one in found):
            columns["steps"] = [f"{one.steps:,}" for one in found]
        best = _best(found)
        lost = ["diverged" if one.state == DIVERGED else "" for one in found]
        columns[""] = ["best" if x.name == best else y for x, y in zip(found, lost, strict=True)]
        table = Table()
        for head in columns:
            table.add_column(head, justify="right", no_wrap=True)
        for row in zip(*columns.values(), strict=True):
            table.add_row(*row)
        return table


def _best(found: Sequence[Result]) -> str | None:
    """Return the name of the best run of those that are done or were stopped, if there is one."""
    return next((one.name for one in found if one.state in (DONE, STOPPED)), None)


def _loss(value: float | None) -> str:
    return f"{value:.4f}" if value is not None and math.isfinite(value) else "–"


def _perplexity(one: Result) -> str:
    return "–" if one.eval_loss is None else f"{math.exp(min(one.eval_loss, 700.0)):.2f}"


def _accuracy(one: Result) -> str:
    return "–" if one.eval_accuracy is None else f"{one.eval_accuracy:.1%}"
