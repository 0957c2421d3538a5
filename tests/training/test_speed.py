"""Operations that a step counts, and the trace of a run."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from lora_jax.training import log
from lora_jax.training.errors import TrainingError
from lora_jax.training.loop import Settings, Watcher, train
from lora_jax.training.running.flops import flops, flops_of_step
from lora_jax.training.step import init_state, make_step
from tests.training import tiny_model

X, Y = jnp.ones((6, 4)), jnp.ones((4, 5))
PRODUCT = 2 * 6 * 4 * 5


def conv(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def mapped(x, y):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    per_device = jax.shard_map(
        jnp.matmul, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
    )
    return per_device(x, y)


@pytest.mark.parametrize(
    "function, inputs, expected",
    [
        (jnp.matmul, (X, Y), PRODUCT),
        (
            lambda x, y: jnp.einsum("bij,bjk->bik", x, y),
            (jnp.ones((3, 6, 4)), jnp.ones((3, 4, 5))),
            3 * PRODUCT,
        ),
        (jax.grad(lambda x, y: (x @ y).sum(), (0, 1)), (X, Y), 3 * PRODUCT),
        (jax.grad(jax.checkpoint(lambda x, y: jnp.sin(x @ y).sum()), (0, 1)), (X, Y), 4 * PRODUCT),
        (lambda x, y: jax.lax.map(lambda x: x @ y, jnp.stack([x] * 7)), (X, Y), 7 * PRODUCT),
        (
            jax.jit(
                lambda x, y: jax.lax.cond(
                    x[0, 0] > 0, jnp.matmul, lambda x, y: x[:, :1] @ y[:1], x, y
                )
            ),
            (X, Y),
            PRODUCT,
        ),
        # 2 images of 5 × 5 outputs, 3 × 3 × 4 inputs each, 8 channels
        (conv, (jnp.ones((2, 7, 7, 4)), jnp.ones((3, 3, 4, 8))), 2 * (2 * 5 * 5 * 8) * (3 * 3 * 4)),
        # two groups of two channels
        (
            lambda x, y: jax.lax.conv_general_dilated(
                x,
                y,
                (1, 1),
                "VALID",
                feature_group_count=2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            ),
            (jnp.ones((2, 7, 7, 4)), jnp.ones((3, 3, 2, 8))),
            2 * (2 * 5 * 5 * 8) * (3 * 3 * 2),
        ),
        (
            jax.grad(lambda x, y: jax.lax.ragged_dot(x, y, jnp.array([2, 3, 1])).sum(), (0, 1)),
            (X, jnp.ones((3, 4, 5))),
            3 * PRODUCT,
        ),
        (mapped, (X, Y), PRODUCT),
        (lambda x: jnp.sin(x).sum() + x.max(), (X,), 0),
    ],
)
def test_operations_by_hand(function, inputs, expected):
    assert flops(jax.make_jaxpr(function)(*inputs)) == expected


def test_a_step_is_traced_once_and_counts_what_xla_counts():
    """The tiny model has no loop, so XLA's count is right too, but for elementwise operations."""
    traced = []
    job, adapters = tiny_model.job(None, rows=8)

    def loss(params, batch):
        traced.append(1)
        return job.loss(params, batch)

    step = make_step(loss, job.tx)
    inputs = (init_state(adapters, job.tx), job.base, dict(job.data.first(8).arrays), 0)
    counted = flops_of_step(step, *inputs)
    before = len(traced)
    step(*inputs)
    assert len(traced) == before
    inputs = (init_state(adapters, job.tx), *inputs[1:])
    of_xla = step.lower(*inputs).compile().cost_analysis()["flops"]
    assert 0.6 * of_xla < counted <= of_xla


def test_a_trace_of_some_steps(tmp_path):
    """Perfetto's file names the program of the step; the losses are those of a run without it."""
    said = []
    job, start = tiny_model.job(tmp_path, steps=5, profile=2)
    outcome = train(job, start, Watcher(profiled=said.append))
    (line,) = said
    assert line.startswith(
        f"steps 3 to 4 are profiled: open them with 'tensorboard --logdir {tmp_path / 'profile'}'"
    )
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
    (file,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    assert str(file) in line
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    steps = {e["args"]["step_num"] for e in events if "step_num" in e.get("args", {})}
    assert steps == {"3", "4"}
    assert any("PjitFunction(step)" in event.get("name", "") for event in events)
    plain, _ = tiny_model.job(None, steps=5)
    expected = train(plain, start).records
    assert [*map(log.without_speed, outcome.records)] == [*map(log.without_speed, expected)]


def test_a_run_that_is_stopped_ends_its_trace(tmp_path):
    seen, said = [], []
    job, start = tiny_model.job(tmp_path, steps=9, profile=7)
    stop = Watcher(
        lambda: 4 in seen, lambda record: seen.append(record["step"]), profiled=said.append
    )
    assert train(job, start, stop).step == 5
    assert said[0].startswith("steps 3 to 5 are profiled")
    with pytest.raises(TrainingError, match="profile must not be negative"):
        Settings(steps=1, profile=-1)
