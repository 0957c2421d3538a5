"""`--report`: what a run measures, for other tools; none of them can end it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lora_jax.core.foreign import shown
from lora_jax.files.disk import processes
from lora_jax.training import log
from lora_jax.training.reporting.reporters import KINDS, Reporter
from lora_jax.training.reporting.scalars import scalars


class Reports:
    """The reports of one run; process 0 alone writes them.

    Args:
      names: of the tools, keys of `reporters.KINDS`.
      directory: of the run.
      settings: for the tools that show them.
      say: takes a line.
    """

    def __init__(
        self,
        names: Sequence[str],
        directory: Path,
        settings: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self._names = list(dict.fromkeys(names)) if processes.is_first() else []
        self._directory, self._settings, self._say = directory, settings, say
        self._open: dict[str, Reporter] = {}

    def start(self, done: int) -> None:
        """Open the tools, once it is known how many steps were done before."""
        for name in self._names:
            self._try(name, partial(self._open_one, name, done))

    def _open_one(self, name: str, done: int) -> None:
        self._open[name] = KINDS[name].open(self._directory, self._settings, done)

    def report(self, record: log.Record) -> None:
        """Pass on a record of the log."""
        for name, reporter in [*self._open.items()]:
            self._try(name, partial(reporter.report, record["step"], scalars(record)))

    def close(self) -> None:
        """Write what is left."""
        for name, reporter in [*self._open.items()]:
            self._try(name, reporter.close)
        self._open = {}

    def _try(self, name: str, act: Callable[[], None]) -> None:
        """Let a tool do something; one that fails is left out from then on."""
        try:
            act()
        except Exception as error:  # whatever the library of the tool raises
            self._open.pop(name, None)
            said = shown(" ".join(str(error).split())) or type(error).__name__
            self._say(f"note: --report {name} failed ({said}); the run continues without it")
