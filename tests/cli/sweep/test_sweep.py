"""`lora-jax sweep`: its runs are those of `lora-jax train`, and what it writes and says."""

import json
import shlex
import shutil

import numpy as np
import pytest

pytest.importorskip("typer")

from lora_jax.cli import main
from lora_jax.cli.jobs.sweeping import sweep
from lora_jax.files.disk import safetensors_file
from lora_jax.training import log
from lora_jax.training.step import make_gradients
from tests.cli.sweep.command import of_run, words

EVAL = ("--eval-split", 0.25, "--eval-rows", 4)
REPORT = ("--report", "jsonl")
GRID = ("--ranks", "1,2", "--lrs", "3e-2,3e-3", "--slots", 3, *EVAL, "--steps", 5, *REPORT)


@pytest.fixture(scope="module")
def swept(play, tmp_path_factory):
    """Return the directory of a sweep, its command, and how often its step was traced."""
    out, traces = tmp_path_factory.mktemp("sweeps") / "out", []

    def counted(*options):
        gradients = make_gradients(*options)

        def call(*inputs):
            traces.append(inputs)
            return gradients(*inputs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "make_gradients", counted)
        command = words(play, out, *GRID)
        assert main(command) == 0
    return out, command, len(traces)


def test_three_slots_train_four_runs_in_one_program(swept):
    out, _, traces = swept
    assert traces == 1
    records = log.read(out / "log.jsonl")
    steps = {r["run"]: [] for r in records if "run" in r}
    for record in records:
        if "loss" in record:
            steps[record["run"]].append((record["step"], record["run_step"]))
    first = [(n, n) for n in range(1, 6)]
    assert steps == {
        "rank1-lr0.03": first,
        "rank1-lr3e-3": first,
        "rank2-lr0.03": first,
        "rank2-lr3e-3": [(5 + n, n) for n in range(1, 6)],
    }


@pytest.mark.parametrize(
    ("rank", "lr"), [(2, "3e-3"), *[pytest.param(1, "3e-2", marks=pytest.mark.slow)]]
)
def test_a_run_is_that_of_train(swept, rank, lr, play, tmp_path, run):
    """The run of the second wave and one of the first: losses, the adapter and its files."""
    out, _, _ = swept
    name = {"3e-3": "rank2-lr3e-3", "3e-2": "rank1-lr0.03"}[lr]
    more = ("--rank", rank, "--lr", lr, *EVAL, "--steps", 5, *REPORT)
    assert run(*words(play, tmp_path / "one", *more, command="train")).status == 0
    assert_is_that_of_train(out, name, tmp_path / "one")
    mine, its = (log.read(path / "metrics.jsonl") for path in (out / name, tmp_path / "one"))
    assert [one["step"] for one in mine] == [1, 2, 3, 4, 5, 5]
    for one, other in zip(mine, its[-6:], strict=True):  # `train` evaluates before the first too
        assert {*one} <= {*other}
        for key, value in one.items():
            assert value == pytest.approx(other[key], rel=3e-6), key


def assert_is_that_of_train(out, name, single):
    alone = log.read(single / "log.jsonl")
    for key in ("loss", "lr", "gradient_norm", "tokens"):
        want = [r[key] for r in alone if "loss" in r]
        np.testing.assert_allclose(of_run(out, name, key), want, rtol=3e-6, err_msg=key)
    *_, judged = of_run(out, name, "eval_loss")
    assert judged == pytest.approx(log.evaluations(alone)[-1]["eval_loss"], rel=1e-6)
    mine, its = (
        safetensors_file.read(path / "adapter" / "adapter_model.safetensors")[0]
        for path in (out / name, single)
    )
    assert mine.keys() == its.keys()
    for tensor, x in its.items():
        # Adam's steps divide by gradients near zero, so single entries round differently.
        assert np.linalg.norm(mine[tensor] - x) < 1e-5 * np.linalg.norm(x), tensor
    config = "adapter/adapter_config.json"
    assert (out / name / config).read_text() == (single / config).read_text()


def test_the_results(swept):
    out, _, _ = swept
    found = json.loads((out / "results.json").read_text())
    runs = found["runs"]
    losses = [one["eval_loss"] for one in runs]
    assert losses == sorted(losses) and len(losses) == 4
    assert found["best"] == runs[0]["name"]
    seen = set()
    for one in runs:
        assert one["eval_loss"] == of_run(out, one["name"], "eval_loss")[-1]
        assert one["loss"] == pytest.approx(np.mean(of_run(out, one["name"])[-3:]), rel=1e-12)
        assert (one["state"], one["steps"], one["seed"], one["alpha"]) == ("done", 5, 0, None)
        adapter = safetensors_file.read(out / one["name"] / "adapter/adapter_model.safetensors")[0]
        a = next(x for name, x in adapter.items() if "lora_A" in name)
        assert len(a) == one["rank"] and a.tobytes() not in seen
        seen.add(a.tobytes())
        assert one["name"] == f"rank{one['rank']}-lr{ {0.03: '0.03', 0.003: '3e-3'}[one['lr']] }"
    for name in ("losses.png", "map.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_a_finished_sweep_shows_its_table_again(swept, run):
    """Sorted, the best marked, with a command that works."""
    out, command, _ = swept
    before = (out / "log.jsonl").read_bytes()
    done = run(*command, "--resume")
    assert done.status == 0, done.err
    assert "all runs are done already" in done.err
    assert (out / "log.jsonl").read_bytes() == before
    found = json.loads((out / "results.json").read_text())
    rows = [line for line in done.out.splitlines() if line.startswith("│")]
    assert [row.split("│")[4].strip() for row in rows] == [
        f"{one['eval_loss']:.4f}" for one in found["runs"]
    ]
    assert ["best" in row for row in rows] == [True, False, False, False]
    best = out / found["best"] / "adapter"
    (line,) = (line for line in done.out.splitlines() if line.startswith("next: "))
    assert shlex.split(line)[2:7] == ["generate", "--model", "tiny", "--adapter", str(best)]


def test_another_sweep_in_its_place(swept, fails):
    _, command, _ = swept
    assert "already contains a run. Add --resume" in fails(*command)
    changed = [{"1,2": "1,2,4", "3": "2"}.get(word, word) for word in command]
    error = fails(*changed, "--resume")
    assert "ranks was [1, 2], now [1, 2, 4]" in error and "slots was 3, now 2" in error


DAMAGED = {
    "no log": lambda lines: [],
    "no course": lambda lines: [line for line in lines if '"course"' not in line],
    "other slots": lambda lines: [line.replace('"slots": [null, ', '"slots": [') for line in lines],
    "unknown runs": lambda lines: [line.replace("null", "99") for line in lines],
    "another type": lambda lines: [
        line.replace('"course": {', '"course": 3, "a": {') for line in lines
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_log(damage, swept, tmp_path, run):
    out, command, _ = swept
    shutil.copytree(out, tmp_path / "out")
    log_file = tmp_path / "out" / "log.jsonl"
    lines = log_file.read_text().splitlines()
    log_file.write_text("".join(f"{line}\n" for line in DAMAGED[damage](lines)))
    moved = [word if word != str(out) else str(tmp_path / "out") for word in command]
    done = run(*moved, "--resume")
    error = done.err.splitlines()[-1]
    assert done.status == 1 and error.startswith("error: log.jsonl: lacks what became of the runs")


MISTAKES = {
    "--ranks 4,x": "Invalid value for '--ranks': 'x' is not an integer; write them as 1,2,3",
    "--ranks 4,,8": "Invalid value for '--ranks': '' is not an integer; write them as 1,2,3",
    "--ranks 0,4": "Invalid value for '--ranks': each must be at least 1, got 0",
    "--ranks 4,8,4": "Invalid value for '--ranks': 4 is there twice",
    "--lrs 1e-3,0.001": "Invalid value for '--lrs': 0.001 is there twice",
    "--lrs 1e-3,-1": "Invalid value for '--lrs': each must be above 0 and finite, got -1",
    "--lrs nan": "Invalid value for '--lrs': each must be above 0 and finite, got nan",
    "--lrs inf": "Invalid value for '--lrs': each must be above 0 and finite, got inf",
    "--alphas 8,0": "Invalid value for '--alphas': each must be above 0 and finite, got 0",
    "--weight-decays -1": "'--weight-decays': each must be at least 0 and finite, got -1",
    "--dropouts 0,1": "Invalid value for '--dropouts': each must be from 0 to 0.99, got 1",
    "--seeds 1.5": "Invalid value for '--seeds': '1.5' is not an integer",
    "--slots -1": "Invalid value for '--slots': must be at least 0, got -1",
    "--halving --lrs 1,2": "--halving keeps one of 3 runs (--eta), but there are 2; add values",
    "--halving --eta 1": "Invalid value for '--eta': must be at least 2, got 1",
    "--init pissa": "pissa changes the base, which all runs share; train such runs one by one",
    "--rank 4": "No such option: --rank; perhaps --ranks",
    "--lr 1e-3": "No such option: --lr; perhaps --lrs",
    "--learning-rate 1e-3": "No such option: --learning-rate; use --lrs",
    "--mesh auto": "No such option: --mesh; the runs of a sweep share one device; it is an option",
    "--stream --seeds 1,2": "the order of streamed rows depends on the seed; give one seed",
    "--steps 3 --epochs 2": "give either --steps or --epochs, not both",
}


@pytest.mark.parametrize("more", MISTAKES)
def test_mistakes(more, tmp_path, fails):
    assert MISTAKES[more] in fails(*words("a.txt", tmp_path / "out", *more.split()), status=2)
    assert not (tmp_path / "out").exists()


def test_a_rank_that_no_weight_can_hold(play, tmp_path, fails):
    error = fails(*words(play, tmp_path / "out", "--ranks", "2,4000", "--steps", 1))
    assert "--ranks 4000 is above what the weight" in error and "override" not in error
    assert not (tmp_path / "out").exists()


def test_a_directory_of_other_files(play, tmp_path, fails):
    (tmp_path / "mine.txt").touch()
    assert "contains files that are not a run's (mine.txt)" in fails(*words(play, tmp_path))


@pytest.mark.parametrize("task", ["classification", "dpo", "orpo"])
def test_each_task_comes_to_its_model(task, fails, tmp_path):
    """What `train` checks of its own options does not stop a command without them."""
    words = ["sweep", "--task", task, "--model", tmp_path / "none", "--data", __file__]
    assert f"{tmp_path / 'none'}" in fails(*words, "--out", tmp_path / "out")
