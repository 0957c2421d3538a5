"""Preference losses, rewards, gradients and steps against those recorded of trl 1.16.0."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models, peft
from lora_jax.files.disk import safetensors_file
from lora_jax.models.text.tokenizer import Tokenizer
from lora_jax.training import preference
from lora_jax.training.dataset import Row, Rows, parse_row
from lora_jax.training.loop import Job, Settings, train
from lora_jax.training.optimizer import Optimizer
from lora_jax.training.packing import assign_in_order
from lora_jax.training.tokenize import Example
from tests.cli import files
from tests.parity.trl.record_trl import BETA, FILE, LOSSES, NAMES, RATE, ROWS, STEPS

WITHOUT_REFERENCE = {
    "orpo": lambda policy: preference.orpo(policy, beta=BETA),
    "cpo": lambda policy: preference.cpo(policy, beta=BETA, alpha=0.5, label_smoothing=0.1),
    "simpo": lambda policy: preference.simpo(policy, beta=BETA, gamma=0.4),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The recorded numbers, the model, and its parameters with the recorded adapter."""
    directory = tmp_path_factory.mktemp("trl")
    files.model(directory / "model")
    (directory / "adapter").mkdir()
    with np.load(FILE) as file:
        found = dict(file)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (directory / "adapter" / name).write_bytes(found[f"adapter/{name}"].tobytes())
    model = models.load(directory / "model")
    adapters = peft.load(directory / "adapter", model.params, model.naming)
    return found, model, lora.join(model.params, adapters), directory


def encoded(directory, length=48):
    """Return the recorded rows as pairs of token ids."""
    rows = []
    for i, row in enumerate(ROWS):
        values = dict(zip(NAMES, row, strict=True))
        kind, values, _ = parse_row(json.dumps(values))
        rows.append(Row(i + 1, values))
    tokenizer = Tokenizer.load(directory / "model")
    return preference.encode_pairs(Rows("rows", kind, tuple(rows)), tokenizer, length).pairs


def log_probs_of(model):
    hidden = functools.partial(model.apply, method="hidden")
    return preference.log_probs_of_frozen_head(hidden, lambda p: p["head"]["kernel"], chunk=48)


def assert_same_gradients(found, name, gradients, adapters, model, directory):
    """Compare gradients, written as PEFT writes the factors."""
    put = lambda node, g: dataclasses.replace(node, a=g.a, b=g.b)
    is_node = lambda x: isinstance(x, lora.LoraWeight)
    written = jax.tree.map(put, adapters, gradients, is_leaf=is_node)
    peft.save(directory / "gradients", written, model.naming, base=model.params)
    ours = safetensors_file.read(directory / "gradients" / "adapter_model.safetensors")[0]
    ours = {key.removeprefix("base_model.model."): x for key, x in ours.items()}
    start = f"{name}/gradient/"
    theirs = {key.removeprefix(start): x for key, x in found.items() if key.startswith(start)}
    assert ours.keys() == theirs.keys() and len(ours) == 8
    for key, x in theirs.items():
        np.testing.assert_allclose(ours[key], x, rtol=1e-4, atol=1e-5, err_msg=key)


def test_rows_have_the_ids_of_trl(world):
    """The same ids and the same tokens of completions, in order."""
    found, _, _, directory = world
    pairs = encoded(directory)
    texts = [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)]
    for text, ids, mask, there in zip(
        texts, found["ids"], found["mask"], found["there"], strict=True
    ):
        np.testing.assert_array_equal(text.ids, ids[there > 0])
        np.testing.assert_array_equal(text.trains, mask[there > 0])


def test_dpo(world):
    """Losses of every kind, rewards and gradients of a batch, packed into rows."""
    found, model, params, directory = world
    data = preference.pack_pairs(encoded(directory), 40)
    assert len(data) < len(ROWS)  # several pairs share a row
    log_probs = lora.lora(log_probs_of(model), on_dense="error")
    batch, there = data.arrays, data.arrays["pairs"] > 0
    base, adapters = lora.split(params)
    reference = jax.jit(log_probs)(lora.disable(params), batch)
    for ours, theirs in zip(reference[:2], found["reference"], strict=True):
        assert sorted(np.asarray(ours)[there]) == pytest.approx(sorted(theirs), abs=1e-4)

    def every_loss(adapters):
        policy = log_probs(lora.join(base, adapters), batch)
        every = {
            kind: preference.dpo(policy, reference, kind=kind, beta=BETA, **options)
            for kind, options in LOSSES.items()
        }
        count = batch["pairs"].sum()
        return {k: (x.losses * batch["pairs"]).sum() / count for k, x in every.items()}, every

    pull, every = jax.jit(jax.jacrev(every_loss, has_aux=True))(adapters)
    for kind in LOSSES:
        loss = every[kind].losses[there].mean()
        assert float(loss) == pytest.approx(float(found[f"{kind}/loss"]), rel=1e-5), kind
        assert_same_gradients(found, kind, pull[kind], adapters, model, directory)
    chosen, rejected = (np.asarray(x)[there] for x in every["sigmoid"][1:])
    metrics = {
        "chosen": chosen.mean(),
        "rejected": rejected.mean(),
        "margins": (chosen - rejected).mean(),
        "accuracies": (chosen > rejected).mean(),
    }
    for name, value in metrics.items():
        assert value == pytest.approx(float(found[f"metrics/rewards/{name}"]), rel=1e-5), name


@pytest.mark.parametrize("name", WITHOUT_REFERENCE)
def test_of_recorded_log_probabilities(name):
    """The loss of TRL's own log-probabilities: sums for CPO, means for the others."""
    found = np.load(FILE)
    read = lambda key: found[f"{name}/metrics/{key}"].astype(np.float32)
    tokens = np.ones((2, len(ROWS)), np.float32)
    if name == "cpo":
        sides = ("chosen", "rejected")
        counts = [[(found[f"cpo/{x}/{i}"][1] >= 0).sum() for i in range(len(ROWS))] for x in sides]
        tokens = np.array(counts, np.float32)
    chosen, rejected, nll = map(read, ("logps/chosen", "logps/rejected", "nll_loss"))
    policy = preference.LogProbs(chosen, rejected, *tokens, -nll)
    losses, *rewards = WITHOUT_REFERENCE[name](policy)
    assert float(losses.mean()) == pytest.approx(float(found[f"{name}/loss"]), rel=1e-5)
    for ours, side in zip(rewards, ("chosen", "rejected"), strict=True):
        np.testing.assert_allclose(ours, read(f"rewards/{side}"), rtol=1e-5)


@pytest.mark.slow
def test_without_a_reference(world):
    """ORPO, CPO and SimPO: the mean over pairs of TRL's loss of one pair; rewards; gradients."""
    found, model, params, directory = world
    pairs = []
    for i in range(len(ROWS)):
        sides = [found[f"orpo/{side}/{i}"] for side in ("chosen", "rejected")]
        pairs.append(preference.Pair(*(Example(x[0].astype(np.int32), x[1] >= 0) for x in sides)))
        for name in ("cpo", "simpo"):  # which have the same ids
            for side, x in zip(("chosen", "rejected"), sides, strict=True):
                np.testing.assert_array_equal(found[f"{name}/{side}/{i}"], x)
    batch = preference.pack_pairs(pairs, 48, assign_in_order, slots=1).arrays
    log_probs = lora.lora(log_probs_of(model), on_dense="error")
    base, adapters = lora.split(params)

    def of(adapters):
        policy = log_probs(lora.join(base, adapters), batch)
        every = {name: loss(policy) for name, loss in WITHOUT_REFERENCE.items()}
        return {name: x.losses.mean() for name, x in every.items()}, every

    gradients, every = jax.jit(jax.jacrev(of, has_aux=True))(adapters)
    for name, (losses, *rewards) in every.items():
        assert float(losses.mean()) == pytest.approx(float(found[f"{name}/loss"]), rel=1e-5)
        for ours, side in zip(rewards, ("chosen", "rejected"), strict=True):
            wanted = found[f"{name}/metrics/rewards/{side}"]
            np.testing.assert_allclose(ours[:, 0], wanted, rtol=1e-4)
        assert_same_gradients(found, name, gradients[name], adapters, model, directory)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["new", "trained"])
def test_steps(start, world):
    """Three steps of AdamW from a trained adapter: to the base, and to the adapter itself."""
    found, model, params, directory = world
    data = preference.pack_pairs(encoded(directory), 32, assign_in_order, slots=1, reference=True)
    log_probs = log_probs_of(model)
    reference = lora.disable(params) if start == "new" else params
    data = preference.with_reference(log_probs, reference, data, rows=2)
    base, adapters = lora.split(params)
    tx = Optimizer(RATE, schedule="constant", warmup=0, clip=0).transformation(adapters, STEPS)
    dpo = functools.partial(preference.dpo, beta=BETA)
    job = Job(
        preference.preference_sums(log_probs, dpo),
        *(base, tx, data, Settings(steps=STEPS, rows=2, shuffle=False)),
        held_out=data,
    )
    records = train(job, adapters).records
    steps = [record for record in records if "loss" in record]
    for name in ("loss", "margin", "accuracy"):
        ours = [record[name] for record in steps]
        assert ours == pytest.approx(found[f"steps/{start}/{name}"], rel=1e-4, abs=1e-5), name
    assert steps[0]["tokens"] == data.arrays["weights"][:2].sum()
    judged = next(record for record in records if "eval_loss" in record)
    if start == "new":
        assert judged["eval_loss"] == pytest.approx(float(found["sigmoid/loss"]), rel=1e-5)
        wanted = float(found["metrics/rewards/margins"])
        assert judged["eval_margin"] == pytest.approx(wanted, rel=1e-5)
