"""`--report` of a sweep: each run reports what the same run of `lora-jax train` would."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.cli.jobs.training.reports import Reports
from lora_jax.training import log
from lora_jax.training.sweeping.comparison import of_run, result


class SweepReports:
    """The reports of all runs, each into the directory of its run.

    Args:
      names: of the tools, keys of `reporters.KINDS`.
      directory: of the sweep.
      settings: of each run by its name, for the tools that show them.
      say: takes a line.
    """

    def __init__(
        self,
        names: Sequence[str],
        directory: Path,
        settings: Mapping[str, Mapping[str, Any]],
        say: Callable[[str], None],
    ) -> None:
        self._names, self._directory = names, directory
        self._settings, self._say = settings, say
        self._done: dict[str, int] = {}
        self._open: dict[str, Reports] = {}

    def start(self, records: Sequence[log.Record]) -> None:
        """Take the log of the steps that were done before."""
        self._done = {name: result(name, of_run(records, name)).steps for name in self._settings}

    def report(self, records: Sequence[log.Record]) -> None:
        """Pass on the records of a step, each to its run."""
        for record in records if self._names else ():
            name = record.get("run")
            if name is None or not {"loss", "eval_loss"} & record.keys():
                continue
            own = {key: x for key, x in record.items() if key not in ("run", "run_step")}
            self._of(name).report({**own, "step": record["run_step"]})

    def _of(self, name: str) -> Reports:
        """Return the reports of a run, which are opened with its first step."""
        if name not in self._open:
            directory = self._directory / name
            directory.mkdir(exist_ok=True)
            found = Reports(self._names, directory, self._settings[name], self._say)
            found.start(self._done.get(name, 0))
            self._open[name] = found
        return self._open[name]

    def close(self) -> None:
        """Write what is left."""
        for reports in self._open.values():
            reports.close()
