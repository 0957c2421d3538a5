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
class HeatMap:
    """Positive values `[ys, xs]` in colour, on a logarithmic scale; the least of a row is marked.

    Each axis is its label, and one text per row or column.
    """

    name: str
    title: str
    xs: tuple[str, Sequence[str]]
    ys: tuple[str, Sequence[str]]
    values: np.ndarray
    label: str  # of the values

    def write(self, folder: Path) -> Path:
        """Draw into `folder`, as `name`.png."""
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure

        (xlabel, columns), (ylabel, rows) = self.xs, self.ys
        figure = Figure(figsize=(1.5 + 0.7 * len(columns), 1.5 + 0.6 * len(rows)))
        figure.set_layout_engine("constrained")
        axes = figure.subplots()
        shown = np.ma.masked_invalid(self.values)
        drawn = axes.imshow(shown, norm=LogNorm(), cmap="viridis_r", aspect="auto")
        for row, values in enumerate(self.values):
            for column, value in enumerate(values):
                weight = "bold" if column == np.nanargmin(values) else "normal"
                box = {"facecolor": "white", "alpha": 0.6, "edgecolor": "none", "pad": 1}
                text = f"{value:.2g}" if value < 100 else f"{value:.0f}"
                axes.text(
                    *(column, row, text), ha="center", va="center", weight=weight, bbox=box, size=8
                )
        axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
        axes.set_yticks(range(len(rows)), rows)
        axes.set(title=self.title, xlabel=xlabel, ylabel=ylabel)
        figure.colorbar(drawn, label=self.label)
        path = folder / f"{self.name}.png"
        figure.savefig(path, dpi=120)
        return path


@dataclasses.dataclass(frozen=True)
class Result:
    """What one experiment found."""

    rows: Sequence[Row]
    pictures: Sequence[Picture | HeatMap] = ()
