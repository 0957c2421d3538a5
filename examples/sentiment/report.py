"""What a user sees of a run besides progress bars: phases and their seconds, a table, the files."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table


class Report:
    """Collects the seconds of each phase and the files written."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}
        self.files: list[Path] = []

    def say(self, text: str) -> None:
        """Print text as it is, whatever brackets are in it."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds that its block takes to the phase `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - start

    def wrote(self, path: Path) -> None:
        """Note a file for the table."""
        self.files.append(path)

    def table(self, rows: Iterable[tuple[str, str]]) -> None:
        """Print `rows`, then the seconds by phase with their total, then the files written."""
        table = Table(show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        for name, value in rows:
            table.add_row(name, value)
        table.add_section()
        for name, seconds in self.seconds.items():
            table.add_row(name, f"{seconds:.1f} s")
        table.add_row("total", f"{sum(self.seconds.values()):.1f} s")
        self.console.print(table)
        for file in self.files:
            self.say(f"wrote {file}")
