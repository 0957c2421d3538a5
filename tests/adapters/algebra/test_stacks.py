"""The algebra of stacks, and of adapters that `select` took out of one: each adapter's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import ConfigError, StructureError
from tests.adapters.algebra.random_overlays import close, overlay, total, update

pytestmark = pytest.mark.usefixtures("quick_compile")
ADAPTERS = [
    {path: overlay(0, rank=3)[path] for path in ("linear", "stacked")},
    {"linear": overlay(1, rank=1)["linear"], "stacked": None},
]
STACK = lora_jax.stack(ADAPTERS)


def present(nodes):
    return {path: node for path, node in nodes.items() if node is not None}


def test_a_stack_is_its_adapters():
    got = present(lora_jax.combine(STACK, [2.0, -1.0]))
    close(got, total(ADAPTERS, [2.0, -1.0]))
    assert (got["linear"].rank, got["stacked"].rank) == (4, 3)
    base = {path: jnp.zeros(node.shape) for path, node in STACK.items()}
    again = lora_jax.combine(lora_jax.join(base, STACK), [2.0, -1.0])
    close(again, total(ADAPTERS, [2.0, -1.0]))


def test_what_was_selected_has_no_padding():
    chosen = lora_jax.select(STACK, 1)
    got = lora_jax.combine([chosen, ADAPTERS[0]], [1, 1])
    close(present(got), total(ADAPTERS, [1, 1]))
    assert got["linear"].rank == 4 and got["linear"].slot is None
    assert lora_jax.resize(chosen, 2)["linear"].rank == 2
    assert lora_jax.compress(chosen, 2)[0]["linear"].rank == 1


def test_ranks_of_a_stack_change_in_each_slot():
    smaller, kept = lora_jax.compress(STACK, 2)
    singles = [lora_jax.compress(adapter, 2) for adapter in ADAPTERS]
    for got, (want, shares), slot in zip(lora_jax.unstack(smaller), singles, (0, 1), strict=True):
        for path, node in present(want).items():
            np.testing.assert_allclose(update(got[path]), update(node), atol=1e-6)
            np.testing.assert_allclose(kept[path][slot], shares[path])
    assert kept["stacked"][1] == 1


@pytest.mark.slow
def test_slots_grow_with_columns_of_their_own():
    larger = lora_jax.resize({"linear": STACK["linear"]}, 5, key=jax.random.key(0))
    for got, want in zip(lora_jax.unstack(larger), ADAPTERS, strict=True):
        close(got, {"linear": update(want["linear"])})
        assert got["linear"].rank == 5
    new = [np.asarray(x["linear"].a[:, 3:]) for x in lora_jax.unstack(larger)]
    assert new[0].any() and (new[0] != new[1]).all()


def test_magnitudes_of_others_do_not_count():
    """A slot without DoRA in a stack that has it is plain LoRA."""
    dora = dataclasses.replace(ADAPTERS[0]["linear"], magnitude=jnp.ones(5))
    both = lora_jax.stack([{"linear": dora}, {"linear": ADAPTERS[1]["linear"]}])
    got = lora_jax.combine([lora_jax.select(both, 1)], [3])["linear"]
    np.testing.assert_allclose(update(got), 3 * update(ADAPTERS[1]["linear"]), rtol=1e-5)
    with pytest.raises(StructureError, match="linear: DoRA"):
        lora_jax.combine(both)


def test_errors():
    with pytest.raises(StructureError, match=r"the list contains a stack; .* unstack\(stack\)"):
        lora_jax.combine([STACK, ADAPTERS[0]])
    with pytest.raises(ConfigError, match="linear has no values here, and so its ranks are"):
        jax.jit(lambda x: lora_jax.compress(x, 1)[0])(STACK)
    with pytest.raises(ConfigError, match="compress: linear is from a stack and has no values"):
        jax.jit(lambda x: lora_jax.compress(x, 1)[0])(lora_jax.select(STACK, 0))
    params = {"linear": dataclasses.replace(STACK["linear"], w=jnp.ones((6, 5)))}
    with pytest.raises(StructureError, match="linear: a stack of 2 adapters; take one, "):
        lora_jax.intruders(params)
    chosen = lora_jax.select(params, 1)
    assert lora_jax.reduce_intruders(chosen, threshold=0.9)["linear"].slot is None
