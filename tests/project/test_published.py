"""The experiments of `benchmarks.published` at small sizes, and the counts at full size."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from benchmarks import decoder
from benchmarks.decoder import Size
from benchmarks.published import (
    __main__,
    cost,
    counts,
    digits,
    eckart_young,
    eva,
    gradient_norms,
    lora_plus,
    optimizers,
    rank_and_rate,
    sweeps,
    tuned_variants,
)
from benchmarks.published.result import HeatMap, Line, Picture, Result, Row, Unavailable

SMALL = Size(layers=1, width=256, heads=4, vocabulary=64, batch=1, time=32)


@pytest.fixture(autouse=True)
def promotion():
    """Allow rank promotion, as users write a decoder: a norm's weight meets three axes."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize(
    ("size", "rank", "targets", "trained"),
    [
        (counts.GPT3, 1, counts.QV, 4_718_592),
        (counts.GPT3, 4, counts.QV, 18_874_368),
        (counts.GPT3, 8, counts.QV, 37_748_736),
        (counts.GPT3, 2, counts.QKVO, 18_874_368),
        (counts.GPT2_MEDIUM, 4, counts.QV, 393_216),
    ],
)
def test_counts_of_decoders(size, rank, targets, trained):
    assert counts.of_decoder(size, rank, targets).trainable == trained


def test_counts_of_roberta():
    assert counts.of_encoder(counts.ROBERTA_BASE, 8) == (294_912, 294_912 + 124_055_040)


@pytest.mark.parametrize(
    ("published", "digits", "agrees"),
    [(393_216, 0, True), (393_217, 0, False), (0.39, 2, True), (0.35, 2, False), (0.4, 1, True)],
)
def test_a_count_agrees_to_the_digits_that_the_paper_gives(published, digits, agrees):
    row = counts.row("", counts.of_decoder(counts.GPT2_MEDIUM, 4, counts.QV), published, digits)
    assert row.agrees is agrees and bool(row.note) is not agrees


@pytest.mark.slow
def test_memory_and_flops_of_a_small_model(quick_compile):
    full, lora = cost.compiled_pair(SMALL, "unrolled", 2, counts.QV)
    weights = 4 * counts.of_decoder(SMALL, 2, counts.QV).total
    # weights, two moments and gradients against weights, and the activations of both
    assert 2.5 < cost.memory(full) / cost.memory(lora) < 4
    assert 1 < cost.memory(lora) / weights < 1.5
    # nothing is propagated beyond q and v of the only layer; Adam counts for full fine-tuning
    assert 1 / 2 < cost.flops(lora) / cost.flops(full) < 2 / 3


def test_the_derived_share_of_flops():
    size = Size(layers=3, width=64, vocabulary=0)
    # (2N² + 6Nr) / 3N² where all kernels are square
    share = cost.derived_share(size, 4, counts.QKVO)
    square, all_kernels = 4 * 64**2, 12 * 64**2
    assert share == pytest.approx(2 / 3 + 6 * 64 * 4 / (3 * 64**2) * square / all_kernels)


def test_gradients_over_the_rank(quick_compile):
    assert gradient_norms.slope([1, 2, 4], [3.0, 6.0, 12.0]) == pytest.approx(1)
    found = gradient_norms.measure(ranks=(4, 64), width=64, steps=1, seeds=1)
    slopes = {name: gradient_norms.slope((4, 64), norms[:, 0]) for name, norms in found.items()}
    assert abs(slopes["rslora"]) < 0.1 and abs(slopes["standard"] + 0.5) < 0.1


def test_eckart_young(quick_compile):
    least, enough = eckart_young.run(ranks=(2, 4), width=8, steps=600, seeds=1).rows
    assert least.agrees and enough.agrees


def test_a_task_has_the_singular_values_that_are_asked_for():
    values = np.array([3.0, 2.0, 0.5])
    _, delta, x = eckart_young.task(0, 3, values)
    np.testing.assert_allclose(np.linalg.svd(delta)[1], values, rtol=1e-5)
    np.testing.assert_allclose(x.T @ x, np.eye(3), atol=1e-6)


BLOBS = digits.Data(
    np.repeat(np.eye(10, 64, dtype=np.float32), 8, 0), np.repeat(np.arange(10, dtype=np.int32), 8)
)


@pytest.mark.parametrize("config", [None, lora_jax.LoraConfig(rank=2)], ids=["full", "lora"])
def test_tuning_lowers_the_loss_that_is_watched(config, quick_compile):
    base = digits.fresh((16,), seed=0)
    key = jax.random.key(0)
    losses = digits.tune(base, BLOBS, BLOBS, key, 0.01, config=config, steps=40, every=20)
    assert losses.shape == (3,) and losses[2] < losses[1] < losses[0]
    np.testing.assert_allclose(losses[0], digits.loss(base, *BLOBS), rtol=1e-6)


def test_what_each_layer_gets():
    base = digits.fresh((16, 12), seed=0)
    found = digits.inputs(base, BLOBS.images)
    assert {name: x.shape[1] for name, x in found.items()} == {
        "layer_0": 64,
        "layer_1": 16,
        "layer_2": 12,
    }
    last = found["layer_2"] @ base["layer_2"]["kernel"] + base["layer_2"]["bias"]
    np.testing.assert_allclose(last, digits.mlp(base, BLOBS.images), rtol=1e-5)


def test_each_fourth_example_is_held_out():
    train, test = digits.held_out(BLOBS)
    assert (len(train.labels), len(test.labels)) == (60, 20)
    np.testing.assert_array_equal(test.labels, BLOBS.labels[::4])


def test_the_real_digits():
    try:
        data = digits.read()
    except Unavailable:
        pytest.skip("scikit-learn is not installed")
    assert data.images.shape == (1797, 64) and data.images.max() == 1
    assert len(digits.odd().labels) == 906 and set(digits.even().labels) == {0, 2, 4, 6, 8}


def test_steps_to_a_level(monkeypatch):
    curves = {0.1: [3.0, 2.0, 1.0, 0.5], 0.2: [3.0, 1.0, 0.5, 0.2], 0.4: [3.0, 4.0, 5.0, np.nan]}
    monkeypatch.setattr(digits, "tune", lambda *args, **options: jnp.array(curves[args[-1]]))
    monkeypatch.setattr(digits, "even", lambda: BLOBS)
    monkeypatch.setattr(digits, "pretrained", lambda *args: None)
    found = lora_plus.steps_to(optax.adam, tuple(curves), 8, 1.0, steps=6, every=2, seeds=2)
    np.testing.assert_array_equal(found, [4, 2, np.inf])


def test_angles_and_explained_variance():
    x, y = np.eye(3)[:, :1], np.array([[np.sqrt(3) / 2], [0.5], [0]])
    assert eva.largest_angle(x, y) == pytest.approx(30)
    assert eva.largest_angle(2 * x, -x) == pytest.approx(0, abs=1e-6)
    assert eva.explained(np.diag([2.0, 1.0, 1.0]), 5 * x) == pytest.approx(4 / 6)


@pytest.mark.slow
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_runs_of_a_sweep_start_as_the_base_and_learn(init, quick_compile):
    base = digits.fresh((16,), seed=0)
    runs = lora_jax.grid(learning_rate=[1e-6, 1e-2])
    config = lora_jax.LoraConfig(rank=2, init=init)
    (found,) = sweeps.tune(base, runs, config, BLOBS, [BLOBS], steps=40)
    np.testing.assert_allclose(found.loss[0], digits.loss(base, *BLOBS), rtol=1e-3)
    assert found.loss[1] < 0.8 * found.loss[0]
    assert found.accuracy.shape == (2,) and found.accuracy[1] > found.accuracy[0]


def test_best_rates_and_their_power_law():
    assert sweeps.best(np.array([3, np.nan, 1, 2]), sweeps.doubled(1e-3, 4)) == 4e-3
    assert sweeps.power([1, 4, 16], [8, 4, 2]) == pytest.approx(-0.5)


def sums_of_rates(runs, steepness):
    """Losses that are least where rate · rank^steepness is 0.01."""
    at = [np.log(run.learning_rate * run.rank**steepness / 0.01) ** 2 for run in runs]
    return [sweeps.Found(np.array(at), 1 - np.array(at) / 100)]


@pytest.mark.parametrize(("steepness", "agrees"), [(0, [True, False]), (1, [False, True])])
def test_regimes_of_the_best_rate(steepness, agrees, monkeypatch):
    tune = lambda base, runs, *args: sums_of_rates(runs, steepness)
    monkeypatch.setattr(sweeps, "tune", tune)
    monkeypatch.setattr(digits, "even", lambda: BLOBS)
    monkeypatch.setattr(digits, "pretrained", lambda *args: None)
    monkeypatch.setattr(rank_and_rate, "of_full", lambda *args: 1e-3)
    rows = rank_and_rate.run((1, 4), sweeps.doubled(0.01 / 16, 8), 8, 1, 2).rows
    assert [row.agrees for row in rows[2:]] == agrees and rows[0].agrees is agrees[0]


def test_variants_count_at_the_rate_that_other_examples_choose(monkeypatch):
    chosen = np.array([0.1, 0.9, 0.2, 0.3])  # two rates, two seeds: the first has the higher mean
    reported = np.array([0.6, 0.7, 0.9, 0.9])
    worse = sweeps.Found(chosen, reported - 0.05)
    found = {"pissa": [sweeps.Found(chosen, chosen), worse]}
    usual = [sweeps.Found(chosen, chosen), sweeps.Found(chosen, reported)]
    tune = lambda base, runs, config, *args: found.get(config.init, usual)
    monkeypatch.setattr(sweeps, "tune", tune)
    monkeypatch.setattr(digits, "even", lambda: BLOBS)
    monkeypatch.setattr(digits, "pretrained", lambda *args: None)
    (tuned, common), picture = tuned_variants.of_rank(2, (0.1, 0.2), 8, 1, 2)
    assert "LoRA 65.0 ± 7.1 at 1.0e-01" in tuned.ours and "within 5.0 points" in tuned.ours
    assert tuned.agrees is False and tuned.note == "PiSSA is 5.0 below LoRA"
    assert common.ours.startswith("5.0 points") and len(picture.lines) == 8


def test_muons_polynomial_makes_singular_values_about_one():
    x = np.random.default_rng(0).standard_normal((2, 12, 5)).astype(np.float32)
    for matrices in (x, x.swapaxes(-1, -2)):
        values = np.linalg.svd(optimizers.sign(matrices))[1]
        assert values.shape == (2, 5) and abs(values - 1).max() < 0.4


LOSSES = {  # at two rates, for two seeds
    "Adam": [[2.0, 2.2], [3.0, 3.0]],
    "LoRA+": [[1.9, 2.1], [3.0, 3.0]],
    "scaled Adam": [[1.9, 2.3], [3.0, 3.0]],
    "LoRA-RITE": [[2.5, 2.5], [2.1, 2.3]],
    "Muon": [[1.8, 2.0], [3.0, 3.0]],
    "LoRA-Muon, r=2": [[3.0, 3.0], [2.0, np.nan]],
    "LoRA-Muon, r=8": [[1.9, 2.0], [3.0, 3.0]],
    "LoRA-Muon, r=32": [[1.7, 1.9], [3.0, 3.0]],
}


@pytest.mark.slow
def test_optimizers_are_compared_at_their_best_rates(monkeypatch):
    monkeypatch.setattr(optimizers, "plays", lambda: ["to be or not " * 20, "who is there " * 60])
    monkeypatch.setattr(
        optimizers.Task, "_pretrained", lambda *args: decoder.init(args[0].size, "scan")
    )
    found = {id(optimizers.CONTENDERS[name]): np.array(x) for name, x in LOSSES.items()}
    monkeypatch.setattr(optimizers.Task, "losses", lambda task, one, *args: found[id(one)])
    size = decoder.Size(layers=1, width=8, heads=2, batch=2, time=8)
    *rows, same = optimizers.run(size, count=2, seeds=2).rows
    assert [row.agrees for row in rows] == [True, False, False, True]
    assert [row.note for row in rows[1:3]] == ["no difference that seeds agree on", "higher"]
    assert "2.2000 ± 0.1414 at 2.0e-03" in rows[2].ours  # LoRA-RITE at the second rate
    assert not same.agrees and same.ours.startswith("4 (2), 4 (8), 4 (32)")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LoRA-Muon, r=2", "Muon"])
def test_an_optimizer_lowers_the_loss_of_a_small_decoder(name):
    size = decoder.Size(layers=2, width=16, heads=2, batch=4, time=8)
    task = optimizers.Task(["to be or not " * 40, "who is there " * 80], size, 20)
    losses = task.losses(optimizers.CONTENDERS[name], (1e-9, 0.03), 30, 2)
    before = task.loss(task.base, task.held_out)
    np.testing.assert_allclose(losses[0], before, rtol=1e-4)
    assert (losses[1] < 0.9 * before).all()


def test_a_heat_map_with_a_run_that_diverged(tmp_path):
    values = np.array([[1.0, np.nan, 300.0], [2.0, 1e-3, np.inf]])
    axes = ("rate", ["a", "b", "c"]), ("rank", ["1", "2"])
    path = HeatMap("map", "t", *axes, values, "loss").write(tmp_path)
    assert path == tmp_path / "map.png" and path.stat().st_size > 1000


def test_the_command_writes_rows_and_pictures(monkeypatch, tmp_path, capsys):
    row = Row("a", "2106.09685", "small", "1", "2", False, "because")
    line = Line("l", [1, 2], [1, 10])
    result = Result([row], [Picture("p", "t", "x", "y", [line], "xy")])
    monkeypatch.setattr(counts, "run", lambda: result)

    def unavailable():
        raise Unavailable("nothing there")

    monkeypatch.setattr(cost, "run", unavailable)
    names = ["--only", "counts,cost", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["published", *names])
    __main__.main()
    assert (tmp_path / "p.png").stat().st_size > 1000
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["agrees"] for line in lines] == [False, None]
    assert "not run: nothing there" in capsys.readouterr().out
    assert __main__.markdown(lines[:1]).splitlines()[2] == (
        "| [a](https://arxiv.org/abs/2106.09685) | small | 1 | 2 | no: because |"
    )
