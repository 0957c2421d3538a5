"""`lora-jax train --full` beside a loop written by hand."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("typer")

import lora_jax as lora
from lora_jax.cli.jobs.training import whole_model
from lora_jax.cli.jobs.training.model import open_model
from lora_jax.cli.jobs.training.start import make_start
from lora_jax.cli.train_options import TrainOptions
from lora_jax.core.paths import flatten_with_paths
from lora_jax.training import log
from lora_jax.training.errors import TrainingError
from tests.cli.train.command import words
from tests.cli.train.options.reading import read, tiny

SMALL = ("--length", 32, "--batch", 2, "--lr", "1e-2", "--warmup", 0, "--schedule", "constant")


def by_hand(data, steps):
    """Train all weights with optax and plain `jax.grad`; the losses and the parameters."""
    model = tiny()

    def loss(params, batch):
        ids, segments, weights = (batch[name] for name in ("ids", "segments", "weights"))
        logits = model.apply(params, ids[:, :-1], segments[:, :-1]).astype(jnp.float32)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], axis=-1)
        return -(picked[..., 0] * weights[:, 1:]).sum() / weights[:, 1:].sum()

    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1))
    params, state, losses = model.params, tx.init(model.params), []
    step = jax.jit(jax.value_and_grad(loss))
    for batch in itertools.islice(data.batches_from(2, 0, 0), steps):
        value, gradients = step(params, batch)
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(value))
    return losses, params


@pytest.mark.slow
def test_it_is_the_loop_written_by_hand(play, tmp_path, run, quick_compile):
    out = tmp_path / "out"
    more = ("--full", "--steps", 3, "--weight-decay", 0.1, "--report", "jsonl")
    done = run(*words(play, out, *more, small=SMALL))
    assert done.status == 0, done.err
    assert "90,688 trainable parameters, 100.00% of all" in done.err
    assert f"wrote {out / 'model'}: the model after step 3\n" in done.out
    assert f"next: lora-jax generate --model {out / 'model'} --prompt" in done.out
    losses, params = by_hand(read([play], length=32).data, 3)
    found = [r["loss"] for r in log.read(out / "log.jsonl")]
    np.testing.assert_allclose(found, losses, rtol=2e-6)
    written = open_model(str(out / "model"), None, scan=False)
    want, _ = flatten_with_paths(params)
    got, _ = flatten_with_paths(written.params)
    assert got.keys() == want.keys()
    for path, x in want.items():
        np.testing.assert_allclose(got[path], x, rtol=1e-4, atol=1e-5, err_msg=path)
        assert np.abs(x - flatten_with_paths(tiny().params)[0][path]).max() > 1e-3
    assert json.loads((out / "model" / "config.json").read_text())["num_hidden_layers"] == 2


def test_a_model_is_written_with_what_was_trained(play, tmp_path):
    """Every weight is one larger; of those that do not train none is."""
    task = read([play], tmp_path, length=32)
    options = TrainOptions("tiny", [play], tmp_path, length=32, full=True, layers="1")
    start = make_start(options, tiny(), task)
    base, adapters = lora.split(start.params)
    adapters = jax.tree.map(lambda x, trains: x + trains, adapters, lora.mask(adapters))
    given = (options, task, tiny().naming, start.config, start.params, {})
    results = whole_model.WholeModels(*given, model=tiny().loaded)
    results.check(adapters)
    assert not [*tmp_path.iterdir()]
    results.write("adapter", adapters, {})
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {file.name for file in (tmp_path / "model").iterdir()} == names | {
        "tokenizer_config.json"
    }
    written = open_model(str(tmp_path / "model"), None, scan=False)
    before, _ = flatten_with_paths(base)
    for path, x in flatten_with_paths(written.params)[0].items():
        np.testing.assert_allclose(x, before[path] + path.startswith("layer_1/"), err_msg=path)
    assert written.tokenizer.encode("To be") == tiny().tokenizer.encode("To be")


def trained(**options):
    given = TrainOptions("tiny", [], None, full=True, **options)
    return whole_model.config_of(given, tiny()).train


def test_layers_and_exclusions():
    """As mlx-lm does it: of some layers all weights train, and nothing outside of layers does."""
    every = [*flatten_with_paths(tiny().params)[0]]
    assert trained() == tuple(every)
    last = trained(layers="-1:")
    assert last == tuple(path for path in every if path.startswith("layer_1/")) and len(last) > 5
    assert trained(layers="0") == tuple(path for path in every if path.startswith("layer_0/"))
    assert trained(exclude="embed_tokens") == tuple(
        p for p in every if not p.startswith("embedding")
    )
    rest = trained(exclude="q_proj", layers="1")
    assert {*last} - {*rest} == {"layer_1/attention/query/kernel"}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"layers": "7"}, "--layers '7': the model has 2 layers"),
        ({"layers": "1", "scan": True}, "leave out --scan"),
        ({"exclude": "embed_tokens", "layers": "x"}, "--layers 'x': give numbers"),
    ],
)
def test_what_leaves_nothing_to_train(options, error):
    with pytest.raises(Exception, match=error) as raised:
        trained(**options)
    assert isinstance(raised.value, TrainingError) or "give numbers" in error


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (("--rank", 4, "--dora"), "--full trains all weights; leave out --rank, --dora"),
        (("--quantize", "nf4"), "--full trains all weights; leave out --quantize"),
        (("--adapter", "x"), "--full trains all weights; leave out --adapter"),
        (("--task", "classification"), "--full is not for --task classification"),
        (("--optimizer", "lora-rite"), "--optimizer lora-rite is for adapters"),
    ],
)
def test_what_is_refused(more, error, tmp_path, fails):
    assert error in fails(*words("a.txt", tmp_path / "o", "--full", *more, small=()), status=2)


@pytest.mark.slow
def test_a_resumed_run_is_exact(play, tmp_path, run):
    """With Muon, which has other states for matrices than for the rest."""
    more = ("--full", "--optimizer", "muon", "--last-layers", 1)
    one, whole = tmp_path / "one", tmp_path / "whole"
    for out, steps, resume in ((one, 2, ()), (one, 4, ("--resume",)), (whole, 4, ())):
        done = run(*words(play, out, *more, "--steps", steps, *resume, small=SMALL))
        assert done.status == 0, done.err
    name = "model/model.safetensors"
    assert (one / name).read_bytes() == (whole / name).read_bytes()
