"""What a run shows while it goes."""

import io

import numpy as np
import pytest

pytest.importorskip("rich")

from rich.console import Console

from lora_jax.training import loss_curve, progress


def records(count, seconds=0.5, first=1):
    return [
        {"step": first + i, "loss": 4.0 - i / 100, "lr": 1e-4, "tokens": 2048, "seconds": seconds}
        for i in range(count)
    ]


def test_lines_come_every_few_steps_first_and_last():
    said = []
    show = progress.lines(said.append, 23, 10)
    for record in records(21, first=3):  # a run that is resumed after step 2
        show(record)
    show({"step": 23, "eval_loss": 1.0, "perplexity": 2.7})
    assert [line.split(":")[0] for line in said] == [
        f"step {step} of 23" for step in (3, 10, 20, 23)
    ]
    assert said[0] == "step 3 of 23: loss 4.000, lr 1.0e-04"  # its time is that of compiling
    assert said[1] == "step 10 of 23: loss 3.930, lr 1.0e-04, 4,096 tokens/s, 0:00:06 left"


def test_the_bar_fits_into_80_columns():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, _environ={"TERM": "xterm"})
    with progress.bar(console, 100_000, done=99_990) as show:
        for record in records(3, seconds=0.01, first=99_991):
            show(record)
        show({"step": 99_993, "eval_loss": 9.0, "perplexity": 8103.08})
    drawn = [line.split("\r")[-1] for line in out.getvalue().splitlines()]
    plain = [Console(file=io.StringIO()).render_str(line).plain for line in drawn]
    last = next(line for line in reversed(plain) if "train" in line)
    for part in ("99993/100000", "loss 3.990", "204,800 tok/s", "ppl 8103.08"):
        assert part in last
    assert "…" not in last


def test_a_wide_bar_has_all_of_the_speed_and_fits():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=112, _environ={"TERM": "xterm"})
    more = {"flops": 9_500_000_000_000, "peak_bytes": 127_300_000_000}
    with progress.bar(console, 100_000, done=99_990) as show:
        for record in records(3, seconds=0.05, first=99_991):
            show({**record, **more})
        show({"step": 99_993, "eval_loss": 9.0, "perplexity": 8103.08})
    text = Console(file=io.StringIO()).render_str(out.getvalue()).plain
    last = [line for line in text.splitlines() if "99993/100000" in line][-1]
    assert "40,960 tok/s, 190 TFLOP/s, peak 127 GB" in last and "ppl 8103.08" in last


def lines_of(count, held_out=()):
    log = [{"step": i + 1, "loss": float(x)} for i, x in enumerate(np.exp(-np.arange(count) / 9))]
    log += [{"step": step, "eval_loss": loss} for step, loss in held_out]
    (axes,) = loss_curve.plot(log, "a run").axes
    return axes, {line.get_label(): line.get_xydata() for line in axes.lines}


@pytest.mark.parametrize("count, window", [(6, 3), (30, 5), (60, 11), (500, 21)])
def test_the_mean_is_centred_and_says_over_how_many_steps(count, window):
    """By hand: each point is the mean of `window` losses around its step."""
    axes, lines = lines_of(count, held_out=[(0, 1.2), (count, 0.1)])
    assert axes.get_title() == "a run"
    losses = lines["each step"][:, 1]
    mean = lines[f"centred mean of {window} steps"]
    half = window // 2
    assert mean[0, 0] == half + 1 and mean[-1, 0] == count - half
    for step, value in mean:
        i = int(step) - 1
        assert value == pytest.approx(losses[i - half : i + half + 1].mean())
    np.testing.assert_array_equal(lines["held out"], [(0, 1.2), (count, 0.1)])


def test_a_short_run_has_no_mean():
    _, lines = lines_of(3)
    assert set(lines) == {"each step"}
