"""The directory of a run: what is refused on resuming."""

import datetime
import json

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.files.disk.fingerprint import fingerprint
from lora_jax.training import run_record
from lora_jax.training.batching import Data
from lora_jax.training.errors import TrainingError

SETTINGS = {"rank": 8, "learning_rate": 1e-3, "targets": ["q_proj", "v_proj"]}


def data(first=1):
    return Data({"ids": np.array([[first, 2]], np.int32), "weights": np.ones((1, 2), np.float32)})


def identity(settings=None, base=1.0, first=1, held_out=None):
    tree = {"a": jnp.full(3, base), "b": jnp.zeros(2)}
    return run_record.identity(SETTINGS | (settings or {}), tree, data(first), held_out)


def test_the_same_run_is_resumed(tmp_path):
    assert not run_record.begin(tmp_path / "out", identity(), resume=False)
    assert run_record.begin(tmp_path / "out", identity(), resume=True)
    with pytest.raises(TrainingError, match=r"already contains a run\. Add --resume"):
        run_record.begin(tmp_path / "out", identity(), resume=False)


def test_nothing_to_resume_is_a_beginning(tmp_path):
    assert not run_record.begin(tmp_path, identity(), resume=True)
    assert run_record.begin(tmp_path, identity(), resume=True)


@pytest.mark.parametrize(
    "other, said",
    [
        ({"settings": {"rank": 4}}, ["rank was 8, now 4"]),
        ({"settings": {"new": None, "rank": 2}}, ["rank was 8, now 2"]),
        ({"settings": {"new": "x"}}, ['new was not given, now "x"']),
        ({"base": 2.0}, ["the model is different: 1 of 2 arrays, a first"]),
        ({"first": 9}, ["the training data is different"]),
        ({"held_out": data()}, ["the held-out data is different"]),
        (
            {"settings": {"rank": 4}, "first": 9, "base": 0.5},
            [
                "rank was 8, now 4",
                "the training data is different",
                "the model is different: 1 of 2 arrays, a first",
            ],
        ),
    ],
)
def test_another_run_is_refused(tmp_path, other, said):
    run_record.begin(tmp_path, identity(), resume=False)
    with pytest.raises(TrainingError, match="was started with different settings") as error:
        run_record.begin(tmp_path, identity(**other), resume=True)
    assert str(error.value).split("\n")[1:] == said


@pytest.mark.parametrize("content", ["{", "[]", "{}", json.dumps({"settings": 1})])
def test_a_damaged_file(tmp_path, content):
    (tmp_path / run_record.RUN_FILE).write_text(content)
    with pytest.raises(
        TrainingError, match=r"run\.json is damaged .* Start again with another --out"
    ):
        run_record.begin(tmp_path, identity(), resume=True)


def test_the_start_is_kept(tmp_path):
    """The present for a new run, what the first record says for one that is resumed."""
    first = datetime.datetime(2020, 2, 3, 4, 5, 6)
    before = datetime.datetime.now().replace(microsecond=0)
    assert run_record.started(tmp_path, resume=True) >= before
    tree = {"a": jnp.ones(3)}
    record = run_record.identity(SETTINGS, tree, data(), None, first)
    run_record.begin(tmp_path, record, resume=False)
    assert run_record.started(tmp_path, resume=True) == first
    assert run_record.started(tmp_path, resume=False) >= before
    later = run_record.identity(SETTINGS, tree, data(), None, before)
    assert run_record.begin(tmp_path, later, resume=True)
    assert run_record.started(tmp_path, resume=True) == first


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"started": 3}', '{"started": "soon"}'])
def test_a_record_without_a_start(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    now = datetime.datetime.now()
    assert abs(run_record.started(tmp_path, resume=True) - now) < datetime.timedelta(minutes=1)


def test_a_run_of_an_older_release_is_resumed(tmp_path):
    """Its checksums are compared with checksums of the same kind, and still tell models apart."""
    tree = {"a": jnp.full(3, 1.0), "b": jnp.zeros(2)}
    before = identity() | {"base": fingerprint(tree, weak=tree)}
    run_record.write(tmp_path, before)
    with pytest.raises(TrainingError, match="the model is different"):
        run_record.begin(tmp_path, identity(), resume=True)
    weak = run_record.older_checksums(tmp_path)
    again = run_record.identity(SETTINGS, tree, data(), None, weak=weak)
    assert run_record.begin(tmp_path, again, resume=True)
    other = run_record.identity(SETTINGS, tree | {"b": jnp.ones(2)}, data(), None, weak=weak)
    with pytest.raises(TrainingError, match="the model is different: 1 of 2 arrays, b first"):
        run_record.begin(tmp_path, other, resume=True)


def test_settings_that_may_change(tmp_path):
    run_record.begin(tmp_path, identity(), resume=False)
    longer = identity({"rank": 4})
    assert run_record.begin(tmp_path, longer, resume=True, free=("rank",))
    assert run_record.recorded(tmp_path, "rank") == 8
    run_record.write(tmp_path, longer)
    assert run_record.recorded(tmp_path, "rank") == 4
