"""What a sweep shows while it goes."""

import io

import pytest

pytest.importorskip("rich")

from rich.console import Console

from lora_jax.training.sweeping import progress


def step(number, losses, seconds=0.5):
    """The records of one step of some runs."""
    runs = [
        {"step": number, "run": name, "run_step": number, **({"loss": x} if x else {"diverged": 1})}
        for name, x in losses.items()
    ]
    return [{"step": number, "tokens": 2048, "seconds": seconds}, *runs]


def end(number, name, how="done", loss=None):
    names = {"step": number, "run": name, "run_step": number}
    judged = [] if loss is None else [{**names, "eval_loss": loss, "perplexity": 1.0}]
    return [*judged, {**names, "ended": how}]


def test_lines():
    said = []
    show = progress.lines(said.append, 22, 10)
    for number in range(3, 23):  # a sweep that is resumed after step 2
        show(step(number, {"a": 4 - number / 100, "b": None if number > 9 else 3.5}))
    show(end(22, "a", loss=3.5))
    show(end(22, "b", "diverged"))
    assert said == [
        "step 3 of 22: 2 runs, loss 3.500 (b) to 3.970",
        "step 10 of 22: 2 runs, loss 3.900 (a), 4,096 tokens/s, 0:00:06 left",
        "step 20 of 22: 2 runs, loss 3.800 (a), 4,096 tokens/s, 0:00:01 left",
        "step 22 of 22: 2 runs, loss 3.780 (a), 4,096 tokens/s, 0:00:00 left",
        "a: done at step 22, held-out loss 3.5000",
        "b: diverged at step 22",
    ]
    said.clear()
    progress.lines(said.append, None, 10)(step(1, {"a": None}))
    assert said == ["step 1: 1 run"]


@pytest.mark.parametrize("height", [8, 40])
def test_a_bar_for_each_run(height):
    """Those that ended are left out in a low terminal."""
    out = io.StringIO()
    options = {"width": 80, "height": height, "force_terminal": True}
    console = Console(file=out, **options, _environ={"TERM": "xterm"})
    with progress.bars(console, 3, 4, 8) as show:
        for number in range(1, 5):
            show(step(number, {"rank16-lr3e-4": 2.5, "rank4-lr1e-4": 3.25}))
        show(end(4, "rank16-lr3e-4", loss=2.125))
        show(end(4, "rank4-lr1e-4", "stopped"))
        show(step(5, {"rank64-lr1e-4": 1.5}))
    text = Console(file=io.StringIO()).render_str(out.getvalue()).plain
    drawn = text.rpartition("sweep ")[2].splitlines()[:-1]  # the last picture
    assert "5/8" in drawn[0] and "2 of 3 runs ended, 4,096 tok/s" in drawn[0]
    if height == 40:
        assert "rank16-lr3e-4" in drawn[1] and "4/4" in drawn[1] and "held out 2.125" in drawn[1]
        assert "rank4-lr1e-4" in drawn[2] and "stopped" in drawn[2]
    assert len(drawn) == (4 if height == 40 else 2)
    assert "rank64-lr1e-4" in drawn[-1] and "5/4" in drawn[-1] and "loss 1.500" in drawn[-1]
    assert "…" not in text
