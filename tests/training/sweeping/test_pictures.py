"""The pictures of a sweep, and how its runs compare, by their logs."""

import math

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from lora_jax.training.sweeping import pictures
from lora_jax.training.sweeping.comparison import results

SETTINGS = {
    "a": {"rank": 4, "lr": 1e-3, "seed": 0},
    "b": {"rank": 16, "lr": 1e-3, "seed": 0},
    "c": {"rank": 16, "lr": 1e-3, "seed": 1},
    "d": {"rank": 4, "lr": 3e-4, "seed": 0},
    "e": {"rank": 16, "lr": 3e-4, "seed": 0},
}
LOSSES = {"a": 3.0, "b": 2.0, "c": 1.5, "d": 4.0}


def log_of(name, loss, steps=6, held_out=None, how="done"):
    losses = loss + np.arange(steps, 0, -1) / 10
    names = [{"step": 50 + n, "run": name, "run_step": n} for n in range(1, steps + 1)]
    records = [{**n, "loss": float(x)} for n, x in zip(names, losses, strict=True)]
    records += [] if held_out is None else [{**names[-1], "eval_loss": held_out}]
    return [*records, {**names[-1], "ended": how}]


RECORDS = [r for name, loss in LOSSES.items() for r in log_of(name, loss)]


def test_the_best_comes_first_and_a_loss_is_the_mean_of_the_last_steps():
    """Three of six: loss + (0.3 + 0.2 + 0.1) / 3."""
    found = results([*SETTINGS], RECORDS)
    assert [one.name for one in found] == ["c", "b", "a", "d", "e"]
    assert found[0].loss == pytest.approx(1.7) and found[0].steps == 6
    assert found[-1].steps == 0 and math.isinf(found[-1].score) and found[-1].state is None


def test_held_out_losses_decide_where_there_are_some():
    records = [*log_of("a", 1.0, held_out=3.0), *log_of("b", 2.0, held_out=2.5)]
    assert [one.name for one in results(["a", "b"], records)] == ["b", "a"]


def test_a_run_that_was_stopped_or_diverged_comes_last():
    lost = {"step": 60, "run": "c", "run_step": 7, "diverged": True}
    records = [
        *(*log_of("a", 0.0, steps=3, how="stopped"), *log_of("b", 9.0)),
        *(*log_of("c", 0.0, how="diverged"), lost),
    ]
    found = results(["a", "b", "c"], records)
    assert [one.name for one in found] == ["b", "c", "a"]
    assert math.isinf(found[1].score) and math.isinf(found[1].loss)


def test_the_losses_of_all_runs_by_their_own_steps():
    found = results([*SETTINGS], RECORDS)
    (axes,) = pictures.plot_losses(found, RECORDS, "five runs").axes
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    assert [*lines] == ["c", "b", "a", "d"] and axes.get_title() == "five runs"
    np.testing.assert_allclose(lines["a"], [(n, 3.7 - n / 10) for n in range(2, 6)])
    widths = [line.get_linewidth() for line in axes.lines]
    assert widths[0] > max(widths[1:])


def test_the_map_has_the_lowest_loss_of_each_rank_and_rate():
    found = results([*SETTINGS], RECORDS)
    axes, bar = pictures.plot_map(found, SETTINGS, "").axes
    (image,) = axes.images
    np.testing.assert_allclose(image.get_array().filled(-1), [[4.2, 3.2], [-1, 1.7]])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["3e-4", "1e-3"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["4", "16"]
    assert [text.get_text() for text in axes.texts] == ["4.200", "3.200", "–", "1.700"]
    assert bar.get_ylabel() == "training loss"


def test_pictures_of_nothing():
    """Every run diverged at once."""
    found = results(["a", "b"], [])
    assert pictures.plot_losses(found, [], "").axes[0].lines[:] == []
    axes, _ = pictures.plot_map(found, SETTINGS, "").axes
    assert [text.get_text() for text in axes.texts] == ["–", "–"]
