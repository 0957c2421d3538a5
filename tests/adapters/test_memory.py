"""memory_report: bytes counted by hand, temporaries as the compiler says, from shapes alone."""

import jax
import jax.numpy as jnp
import optax
import pytest

import lora_jax
from lora_jax import LoraConfig, MemoryReport, StepMemory, StructureError

pytestmark = pytest.mark.usefixtures("optimized")

KEY = jax.random.key(0)
WIDTH, HIDDEN, TOKENS, RANK = 256, 512, 64, 4


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


PARAMS = {
    "up": {"kernel": shape(WIDTH, HIDDEN), "bias": shape(HIDDEN)},
    "down": {"kernel": shape(HIDDEN, WIDTH)},
    "steps": shape(dtype=jnp.int32),
}
X = shape(TOKENS, WIDTH)


def model(params, x):
    h = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
    return h @ params["down"]["kernel"]


def loss(params, x):
    return (lora_jax.lora(model)(params, x) ** 2).mean()


def adapt(**fields):
    return lora_jax.init(KEY, PARAMS, LoraConfig(**{"rank": RANK, **fields}), model, X)


BASE = 4 * (2 * WIDTH * HIDDEN + HIDDEN + 1)
FACTORS = 4 * 2 * RANK * (WIDTH + HIDDEN)
SCALES = 4 * 2


def test_bytes_by_hand():
    report = lora_jax.memory_report(loss, adapt(), X)
    ours, full = report.adapted, report.full
    assert (ours.base, ours.adapters, ours.optimizer) == (BASE, FACTORS + SCALES, 2 * FACTORS + 4)
    assert (full.base, full.adapters, full.optimizer) == (BASE, 0, 2 * (BASE - 4) + 4)
    assert ours.arguments == full.arguments == 4 * TOKENS * WIDTH
    assert ours.total == sum((BASE, FACTORS, SCALES, 2 * FACTORS + 4, ours.arguments)) + (
        ours.temporaries
    )
    # full fine-tuning holds a gradient of every kernel at some time, ours of none
    assert full.temporaries >= 4 * WIDTH * HIDDEN
    assert 0 < ours.temporaries < full.temporaries


def test_temporaries_are_those_of_the_step_as_users_write_it():
    params = adapt(train=["bias"])
    tx = optax.sgd(1e-2, momentum=0.9)
    base, adapters = lora_jax.split(params)
    frozen = lora_jax.freeze(tx, adapters)

    def step(adapters, state, base, x):
        value, grads = jax.value_and_grad(lambda a: loss(lora_jax.join(base, a), x))(adapters)
        updates, state = frozen.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    state = jax.eval_shape(frozen.init, adapters)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(adapters, state, base, X).compile()
    report = lora_jax.memory_report(loss, params, X, tx=tx).adapted
    assert report.temporaries == pytest.approx(
        compiled.memory_analysis().temp_size_in_bytes, rel=0.02
    )
    assert report.optimizer == FACTORS + 4 * HIDDEN
    assert report.adapters == FACTORS + SCALES + 4 * HIDDEN + 4


def test_arrays_say_the_same_as_shapes():
    zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
    params = adapt()
    want = lora_jax.memory_report(loss, params, X)
    assert lora_jax.memory_report(loss, zeros(params), zeros(X)) == want


def test_a_model_too_large_to_allocate():
    """A terabyte of weights, as shapes."""
    params = {"kernel": shape(2**19, 2**19)}
    params = lora_jax.init(KEY, params, LoraConfig(rank=1))
    apply = lora_jax.lora(lambda p, x: x @ p["kernel"])
    report = lora_jax.memory_report(lambda p, x: apply(p, x).sum(), params, shape(1, 2**19))
    assert report.adapted.base == 2**40 and report.adapted.temporaries < 2**25
    assert report.full.total >= 3 * 2**40


def test_the_table():
    mib = 2**20
    ours = StepMemory(100 * mib, mib, 2 * mib, mib // 4, 1500 * mib)
    full = StepMemory(100 * mib, 0, 200 * mib, mib // 4, 2000 * mib)
    assert str(MemoryReport(ours, full)).splitlines() == [
        "MiB          adapted     full",
        "base           100.0    100.0",
        "adapters         1.0      0.0",
        "optimizer        2.0    200.0",
        "arguments        0.2      0.2",
        "temporaries  1,500.0  2,000.0",
        "total        1,603.2  2,300.2",
    ]


def test_refusals():
    with pytest.raises(StructureError, match="the tree contains no adapters"):
        lora_jax.memory_report(loss, PARAMS, X)
    with pytest.raises(StructureError, match="without their base"):
        lora_jax.memory_report(loss, lora_jax.split(adapt())[1], X)
