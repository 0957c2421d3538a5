"""A picture of a run: losses by step."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lora_jax.files.disk.atomic import write_atomically
from lora_jax.training import log

MOST = 21  # steps of a mean


def draw(records: list[dict[str, Any]], path: Path, title: str = "") -> None:
    """Draw training losses, their centred mean over some steps, and held-out losses.

    Args:
      records: log records, as `log.read` or `loop.train` returns them.
      path: a `.png` file; an existing one is replaced.
      title: above the picture.
    """
    content = io.BytesIO()
    plot(records, title).savefig(content, format="png")
    write_atomically(path, content.getvalue())


def plot(records: list[dict[str, Any]], title: str) -> Figure:
    """Return the picture that `draw` writes."""
    # A bare Figure needs no pyplot, hence no display and no global state.
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps, losses = log.losses(records)
    if steps:
        axes.plot(steps, losses, color="0.75", label="each step")
        window = window_of(len(losses))
        if window > 1:
            middle = steps[window // 2 : len(steps) - window // 2]
            means = np.convolve(losses, np.full(window, 1 / window), mode="valid")
            axes.plot(middle, means, color="C0", label=f"centred mean of {window} steps")
    held_out = log.evaluations(records)
    if held_out:
        points = ([r["step"] for r in held_out], [r["eval_loss"] for r in held_out])
        axes.plot(*points, "o-", color="C1", label="held out")
    axes.set(xlabel="step", ylabel="loss", title=title)
    if steps or held_out:
        axes.legend(frameon=False)
    return figure


def window_of(steps: int) -> int:
    """Return over how many steps to average, an odd number; a mean is drawn where all of them are.

    >>> [window_of(steps) for steps in (2, 6, 50, 1000)]
    [1, 3, 9, 21]
    """
    if steps < 4:
        return 1
    window = min(max(steps // 5, 3), MOST)
    return window - (window % 2 == 0)
