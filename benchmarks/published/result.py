"""Results of an experiment: rows of the table, and pictures."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

Numbers = Sequence[float] | np.ndarray


class Unavailable(Exception):
    """An experiment cannot run here; the message says what is missing."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One published figure, next to ours."""

    what: str
    source: str  # arXiv number or address
    setting: str
    published: str
    ours: str
    agrees: bool | None  # None: it could not run, and `note` says why
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve of a picture; `style` "o" draws points, "--" a dashed line."""

    label: str
    x: Numbers
    y: Numbers
    style: str = "-"


@dataclasses.dataclass(frozen=True)
class Picture:
    """Curves over common axes; `log` contains the letters of the logarithmic ones."""

    name: str
    title: str
    xlabel: str
    ylabel: str
    lines: Sequence[Line]
    log: str = ""

    def write(self, folder: Path) -> Path:
        """Draw into `folder`, as `name`.png."""
        from matplotlib.figure import Figure  # a bare Figure needs no display and no pyplot

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for line in self.lines:
            axes.plot(line.x, line.y, line.style, label=line.label)
        axes.set(title=self.title, xlabel=self.xlabel, ylabel=self.ylabel)
        if "x" in self.log:
            axes.set_xscale("log")
        if "y" in self.log:
            axes.set_yscale("log")
        axes.legend(frameon=False, fontsize="small")
        path = folder / f"{self.name}.png"
        figure.savefig(path, dpi=120)
        return path


@dataclasses.dataclass(frozen=True)
class Result:
    """What one experiment found."""

    rows: Sequence[Row]
    pictures: Sequence[Picture] = ()
