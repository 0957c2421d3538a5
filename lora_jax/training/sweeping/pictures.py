"""Pictures of a sweep: the losses of all runs by step, and a map of rank against rate."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lora_jax.files.disk.atomic import write_atomically
from lora_jax.training import log
from lora_jax.training.loss_curve import window_of
from lora_jax.training.sweeping.comparison import Result, of_run
from lora_jax.training.sweeping.names import Settings, in_short

_MOST_IN_LEGEND = 12


def draw(figure: Figure, path: Path) -> None:
    """Write a picture into a file, whose ending says of which kind; an existing one is replaced."""
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix("."))
    write_atomically(path, content.getvalue())


def plot_losses(results: Sequence[Result], records: Sequence[log.Record], title: str) -> Figure:
    """Return a picture of the training losses by step, a line for each run, the best one bold.

    Args:
      results: the best first.
      records: of the sweep's log.
      title: above the picture.
    """
    figure, axes = _blank()
    colors = colormaps["viridis"](np.linspace(0, 0.9, max(2, len(results))))
    for place, (result, color) in enumerate(zip(results, colors, strict=False)):
        steps, losses = log.losses([dict(r) for r in of_run(records, result.name)])
        window = window_of(len(losses))
        if len(losses) < window or not losses:
            continue
        means = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        middle = steps[window // 2 : len(steps) - window // 2]
        label = result.name if place < _MOST_IN_LEGEND else None
        axes.plot(middle, means, color=color, lw=2.5 if place == 0 else 1, label=label)
    axes.set(xlabel="step", ylabel="training loss", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if axes.lines:
        beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
        axes.legend(frameon=False, fontsize="x-small", title="the best first", **beside)
    return figure


def plot_map(results: Sequence[Result], settings: Mapping[str, Settings], title: str) -> Figure:
    """Return a map of the losses by rank and learning rate; of several runs with both, the lowest.

    Args:
      results: of all runs.
      settings: of each run, by name.
      title: above the picture.
    """
    by = lambda name: sorted({_number(settings[r.name], name) for r in results})
    ranks, rates = by("rank"), by("lr")
    losses = np.full((len(ranks), len(rates)), math.nan)
    for result in results:
        place = (
            ranks.index(_number(settings[result.name], "rank")),
            rates.index(_number(settings[result.name], "lr")),
        )
        if result.steps and math.isfinite(result.score):
            losses[place] = np.nanmin([losses[place], result.score])
    figure, axes = _blank()
    image = axes.imshow(np.ma.masked_invalid(losses), cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(rates)), [in_short(x) for x in rates])
    axes.set_yticks(range(len(ranks)), [in_short(x) for x in ranks])
    middle = (np.nanmin(losses) + np.nanmax(losses)) / 2 if np.isfinite(losses).any() else 0
    for (row, column), loss in np.ndenumerate(losses):
        text = f"{loss:.3f}" if math.isfinite(loss) else "–"
        color = "white" if loss < middle else "black"
        axes.text(column, row, text, ha="center", va="center", color=color)
    axes.set(xlabel="learning rate", ylabel="rank", title=title)
    figure.colorbar(image, ax=axes, label=_label(results))
    return figure


def _label(results: Sequence[Result]) -> str:
    return "held-out loss" if any(r.eval_loss is not None for r in results) else "training loss"


def _number(settings: Settings, name: str) -> float:
    value = settings[name]
    assert value is not None
    return value


def _blank() -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)  # needs no pyplot, hence no display and no global state
    return figure, figure.subplots()
