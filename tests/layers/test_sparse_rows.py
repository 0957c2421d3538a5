"""Row-sparse training: the numbers of whole tables, at a cost without the vocabulary in it."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import lora_jax
from lora_jax import StructureError
from lora_jax.layers import embedding, looked_up, put_rows, take_rows
from tests.programs import is_node
from tests.programs.jaxprs import equations

KEY = jax.random.key(0)
IDS = jnp.array([[1, 4, 4], [9, 4, 0]])
TARGET = jnp.ones((2, 3, 4))


def table(kind, vocabulary=11):
    """A table trained whole, an adapted one, or a frozen one in whose place another is trained."""
    params = embedding.init(KEY, vocabulary, 4, rank=2 if kind == "adapted" else 0)
    if kind == "adapted":
        return jax.tree.map(lambda x: x + 0.1, params)  # B is not zero, so A has a gradient
    if kind == "trained leaf":
        config = lora_jax.LoraConfig(targets=(), train=["embedding"])
        return lora_jax.init(KEY, params, config)
    return params


def loss(params, ids, target, at=None):
    return ((embedding.apply(params, ids, at=at) - target) ** 2).mean()


def stepper(tx):
    """One step on the rows of a batch alone."""

    def step(params, state, ids, target):
        at = looked_up(ids)
        rows, row_state = take_rows(params, at), take_rows(state, at)
        grads = jax.grad(loss)(rows, ids, target, at)
        updates, row_state = tx.update(grads, row_state, rows)
        rows = optax.apply_updates(rows, updates)
        return put_rows(params, at, rows), put_rows(state, at, row_state)

    return step


def optimizer(tx, params):
    return lora_jax.freeze(tx, params) if is_node(params["embedding"]) else tx


@pytest.mark.parametrize(
    "kind, tx",
    [
        ("plain", optax.sgd(0.5, momentum=0.9)),
        ("adapted", optax.adam(0.1)),
        ("trained leaf", optax.adam(0.1)),
    ],
    ids=["plain", "adapted", "trained leaf"],
)
def test_a_step_on_rows_is_a_step_on_the_table(kind, tx, quick_compile):
    """The first step, in which rows without a gradient stand still on a whole table too."""
    params = table(kind)
    tx = optimizer(tx, params)

    def whole(params, state, ids, target):
        updates, state = tx.update(jax.grad(loss)(params, ids, target), state, params)
        return optax.apply_updates(params, updates), state

    both = jax.jit(lambda *args: (stepper(tx)(*args), whole(*args)))
    got, want = both(params, tx.init(params), IDS, TARGET)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-7)
    assert float(jnp.abs(loss(got[0], IDS, TARGET) - loss(params, IDS, TARGET))) > 1e-3
    if kind != "plain":
        np.testing.assert_array_equal(got[0]["embedding"].w, params["embedding"].w)


def test_adam_on_rows_is_torchs_sparse_adam(quick_compile):
    """Two recorded steps on other ids: rows that are not looked up keep their moments."""
    path = pathlib.Path(__file__).parents[1] / "parity" / "torch" / "embedding.safetensors"
    want = {k: jnp.asarray(x) for k, x in load_file(path).items() if k.startswith("sparse/")}
    tx = optax.adam(0.1, eps=1e-30)  # as recorded: torch adds it elsewhere
    params = {"embedding": want["sparse/w"]}
    state, step = tx.init(params), jax.jit(stepper(tx))
    for i in (0, 1):
        params, state = step(params, state, want[f"sparse/ids_{i}"], want["sparse/target"])
        np.testing.assert_allclose(
            params["embedding"], want[f"sparse/after_{i}"], rtol=1e-5, atol=1e-6
        )


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("kind", ["plain", "adapted"])
def test_cost_does_not_depend_on_the_vocabulary(kind):
    """Nothing but the donated tables has the vocabulary's size, in the program or compiled."""
    temporaries = []
    for vocabulary in (1_009, 100_003):
        params = jax.eval_shape(lambda v=vocabulary: table(kind, v))
        tx = optimizer(optax.adam(0.1), params)
        state = jax.eval_shape(tx.init, params)
        traced = jax.jit(stepper(tx), donate_argnums=(0, 1)).trace(params, state, IDS, TARGET)
        made = [
            eqn.primitive.name
            for eqn in equations(traced.jaxpr.jaxpr)
            if any(vocabulary in var.aval.shape for var in eqn.outvars)
        ]
        assert made == ["scatter"] * 3  # the rows, and those of Adam's two moments
        memory = traced.lower().compile().memory_analysis()
        tables = sum(
            x.size * x.dtype.itemsize
            for x in jax.tree.leaves((params, state))
            if vocabulary in x.shape
        )
        assert memory.alias_size_in_bytes >= tables  # written where they are
        temporaries.append(memory.temp_size_in_bytes)
    assert temporaries[0] == temporaries[1] < 20_000


def test_places_that_are_left_hold_rows_of_zeros():
    params = table("adapted")
    rows = take_rows(params, looked_up(jnp.array([4, 4])))["embedding"]
    for taken, whole in ((rows.w, params["embedding"].w), (rows.a, params["embedding"].a)):
        np.testing.assert_array_equal(taken, np.stack([whole[4], np.zeros_like(whole[4])]))


def test_trees_of_several_lengths_are_refused():
    model = {"embedding": jnp.ones((11, 4)), "head": {"kernel": jnp.ones((4, 3))}}
    with pytest.raises(StructureError, match=r"\[4, 11\] rows"):
        take_rows(model, jnp.array([1]))


def test_a_table_with_a_magnitude_is_refused():
    """Its rows alone do not tell the norms of its columns."""
    config = lora_jax.LoraConfig(rank=2, targets=["embedding"], dora=True)
    ids = jnp.array([1])
    params = lora_jax.init(KEY, table("plain"), config, embedding.apply, ids)
    with pytest.raises(StructureError, match="magnitude"):
        take_rows(params, ids)
