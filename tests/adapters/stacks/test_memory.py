"""N adapters cost N times an adapter and its optimizer state, and nothing else."""

import jax
import jax.numpy as jnp
import optax
import pytest

import lora_jax as lora

pytestmark = pytest.mark.usefixtures("optimized")

WIDTH, RANKS, TOKENS = 512, (2, 8, 4), 16
BASE = {name: jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32) for name in ("up", "down")}
X = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.float32)


def model(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def loss(params, x):
    return (lora.lora(model)(params, x) ** 2).mean()


def stack(ranks, **options):
    """Make a stack of shapes: nothing is allocated."""
    configs = [lora.LoraConfig(rank=rank, **options) for rank in ranks]
    inits = [lora.init(jax.random.key(0), BASE, config) for config in configs]
    return lora.join(BASE, lora.stack([lora.split(params)[1] for params in inits]))


def test_bytes_of_a_stack_by_hand():
    factors = 2 * 2 * WIDTH * 8  # of one slot, padded to rank 8
    small = 2 * (1 + 3)  # a scale and a slot's three numbers for each weight
    overlay = lora.split(stack(RANKS))[1]
    assert sum(x.size * 4 for x in jax.tree.leaves(overlay)) == 3 * 4 * (factors + small)
    tx = lora.freeze(optax.adam(1e-3), overlay)
    state = jax.eval_shape(tx.init, overlay)
    assert sum(x.size * 4 for x in jax.tree.leaves(state)) == 2 * 3 * 4 * factors + 4


@pytest.mark.slow
def test_a_step_of_all_has_no_copy_of_the_base():
    base = 2 * 4 * WIDTH * WIDTH
    reports = {
        n: lora.memory_report(loss, stack([8] * n), X, slot_axes=[None]).adapted for n in (2, 16)
    }
    two, many = reports[2], reports[16]
    assert two.base == many.base == base and two.arguments == many.arguments == 4 * TOKENS * WIDTH
    assert many.adapters == 8 * two.adapters and many.optimizer - 4 == 8 * (two.optimizer - 4)
    # each more adapter needs at most four arrays of activations and the gradients of its factors
    most = 4 * 4 * TOKENS * WIDTH + two.adapters // 2
    assert most < 4 * WIDTH * WIDTH / 5
    assert (many.temporaries - two.temporaries) / 14 <= most
    assert two.temporaries < 2 * most


def test_slot_axes_that_do_not_fit_are_refused():
    params = stack(RANKS)
    with pytest.raises(
        lora.ConfigError, match=r"argument 0 has no axis 0 of 3 slots; see slot_axes"
    ):
        lora.memory_report(loss, params, X, slot_axes=[0])
    with pytest.raises(lora.ConfigError, match="slot_axes has 2 entries for 1 arguments"):
        lora.memory_report(loss, params, X, slot_axes=[0, None])


@pytest.mark.slow
def test_reports_of_batches_by_slot_and_of_rows():
    params = stack(RANKS)
    batches = jax.ShapeDtypeStruct((3, TOKENS, WIDTH), jnp.float32)
    report = lora.memory_report(loss, params, batches, slot_axes=[0])
    assert report.adapted.arguments == 3 * report.full.arguments
    rows = lambda params, x, ids: (lora.lora(model, adapters_of=ids)(params, x) ** 2).mean()
    ids = jax.ShapeDtypeStruct((TOKENS,), jnp.int32)
    assert lora.memory_report(rows, params, X, ids).adapted.adapters == report.adapted.adapters
