"""A picture of a run: losses by step."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lora_jax.training import log


def draw(records: list[dict[str, Any]], path: Path, window: int = 20) -> None:
    """Draw training losses, their mean over the last `window` steps, and held-out losses.

    Args:
      records: log records, as `log.read` or `loop.train` returns them.
      path: a `.png` file; an existing one is replaced.
    """
    # A bare Figure needs no pyplot, hence no display and no global state.
    figure = Figure(figsize=(7, 4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps, losses = log.losses(records)
    if steps:
        means = [np.mean(losses[max(0, i - window + 1) : i + 1]) for i in range(len(losses))]
        axes.plot(steps, losses, color="0.75", label="each step")
        axes.plot(steps, means, color="C0", label=f"mean of {window} steps")
    held_out = log.evaluations(records)
    if held_out:
        points = ([r["step"] for r in held_out], [r["eval_loss"] for r in held_out])
        axes.plot(*points, "o-", color="C1", label="held out")
    axes.set(xlabel="step", ylabel="loss")
    if steps or held_out:
        axes.legend(frameon=False)
    canvas.print_png(path)
