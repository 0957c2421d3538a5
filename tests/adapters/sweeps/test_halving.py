"""Successive halving: who goes on, for how long, and that a pause changes nothing."""

import jax
import numpy as np
import pytest

import lora_jax as lora
from tests.adapters.sweeps.by_hand import BASE, CONFIG, LOSS, SCHEDULE, batches, train_alone

#: In this problem the larger rate is the better one, until the loss is infinite.
RATES = [1e-5, 1e-2, 1e30, 1e-3, 1e-4]


def test_the_best_runs_train_longer_and_each_as_it_would_alone():
    traces = []

    def loss(params, *batch):
        traces.append(0)
        return LOSS(params, *batch)

    runs = [
        lora.Run(learning_rate=rate, rank=1 + i % 2, dropout=0.1) for i, rate in enumerate(RATES)
    ]
    data = batches(steps=8)
    sweep = lora.sweep(
        *(loss, BASE, runs, CONFIG, *data[0]), slots=2, schedule=SCHEDULE, buckets=[1]
    )
    seen = []
    outcomes = lora.halving(
        *(sweep, lambda step: data[step]),
        steps=2,
        eta=2,
        validation=data[:1],
        report=lambda number, outcomes: seen.append([x.steps for x in outcomes]),
    )
    # in turn: the layouts, the step of both buckets, the validation
    assert len(traces) == 1 + 2 + 1
    assert [x.run.learning_rate for x in outcomes] == [1e-2, 1e-3, 1e-4, 1e-5, 1e30]
    assert [x.steps for x in outcomes] == [8, 4, 2, 2, 2]
    assert seen == [[2, 2, 2, 2, 2], [4, 4, 2, 2, 2], [8, 4, 2, 2, 2]]
    assert not np.isfinite(outcomes[-1].score)
    for outcome in outcomes[:2]:
        losses, overlay = train_alone(outcome.run, data[: outcome.steps])
        np.testing.assert_allclose(outcome.losses, losses, rtol=1e-6)
        assert jax.tree.structure(outcome.adapters) == jax.tree.structure(overlay)
        params = lora.join(BASE, outcome.adapters)
        np.testing.assert_allclose(outcome.score, LOSS(params, *data[0]), rtol=1e-6)
    assert "score=" in repr(outcomes[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a positive integer, got 0"),
        ({"steps": 1, "eta": 1}, "eta must be a number above 1"),
        ({"steps": 1, "batch_axes": 0}, "all see the same batch.*without batch_axes="),
    ],
)
def test_what_has_no_meaning_is_refused(options, message):
    axes = {"batch_axes": options.pop("batch_axes", None)}
    runs = lora.grid(learning_rate=RATES)
    sweep = lora.sweep(LOSS, BASE, runs, CONFIG, *batches(steps=1)[0], **axes)
    with pytest.raises(lora.ConfigError, match=message):
        lora.halving(sweep, lambda step: (), **options)
