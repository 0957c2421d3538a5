"""Whatever optax does around it: frozen leaves keep their bits, and arguments arrive."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax.training.train_state import TrainState

import lora_jax
from tests.programs import normal

KEY = jax.random.key(0)
X = normal(0, (5, 4), jnp.float32)
# Whatever an addition of zero may change: signed zeros and subnormal numbers.
ODD = np.array([-0.0, 0.0, 1e-40, -1e-42], np.float32)


def odd(shape, seed):
    w = np.array(normal(seed, shape, jnp.float32))
    w.reshape(-1)[: ODD.size] = ODD
    return jnp.asarray(w)


BASE = {"up": {"kernel": odd((4, 6), 1), "bias": odd((6,), 2)}, "down": {"kernel": odd((6, 4), 3)}}


def model(params, x):
    h = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
    return x + h @ params["down"]["kernel"]


apply = lora_jax.lora(model)
CONFIG = lora_jax.LoraConfig(rank=2)
PARAMS = lora_jax.init(KEY, BASE, CONFIG, model, X)


def loss(params):
    return ((apply(params, X) - jnp.flip(X, 1)) ** 2).mean()


def bits(tree):
    return jax.tree.map(lambda x: np.asarray(x).tobytes(), tree)


def trained(params):
    leaves = jax.tree.leaves(params)
    train = jax.tree.leaves(lora_jax.mask(params))
    return [x for x, t in zip(leaves, train, strict=True) if t]


WRAPPERS = {
    "plain": lambda tx: tx,
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "chain": lambda tx: optax.chain(tx, optax.scale(-1.0), optax.scale(-1.0)),
}


@pytest.mark.parametrize(
    "jitted", [pytest.param(False, marks=pytest.mark.slow), True], ids=["eager", "two_jits"]
)
@pytest.mark.parametrize("name", WRAPPERS)
def test_frozen_leaves_keep_their_bits(name, jitted, tmp_path):
    tx = WRAPPERS[name](lora_jax.freeze(optax.adam(1e-2), PARAMS))
    compiled = jax.jit if jitted else lambda fn: fn
    gradient = jax.jit(jax.grad(loss))
    update = compiled(tx.update)
    apply_updates = compiled(lora_jax.apply_updates)
    params, state = PARAMS, tx.init(PARAMS)
    for i in range(4):
        grads = gradient(params)
        if i == 1 and name == "apply_if_finite":
            grads = jax.tree.map(lambda x: x * jnp.nan, grads)
        updates, state = update(grads, state, params)
        params = apply_updates(params, updates)
    base, _ = lora_jax.split(params)
    assert bits(base) == bits(BASE)
    assert not np.array_equal(trained(params)[1], trained(PARAMS)[1])
    lora_jax.save(tmp_path / "a", params)
    lora_jax.load(tmp_path / "a", BASE)


@pytest.mark.parametrize("name", WRAPPERS)
def test_updates_of_freeze_change_no_sign_either(name):
    """Code that adds the updates itself, as `TrainState` and `nnx.Optimizer` do."""
    tx = lora_jax.freeze(WRAPPERS[name](optax.adam(1e-2)), PARAMS)
    state = TrainState.create(apply_fn=model, params=PARAMS, tx=tx)
    for _ in range(2):
        state = state.apply_gradients(grads=jax.grad(loss)(state.params))
    base, _ = lora_jax.split(state.params)
    tiny = np.finfo(np.float32).tiny  # an addition on a CPU makes smaller numbers zero
    flushed = jax.tree.map(lambda x: np.where(np.abs(x) < tiny, np.copysign(0, x), x), BASE)
    assert bits(base) == bits(jax.tree.map(lambda x: x.astype(np.float32), flushed))


def test_a_train_state_of_the_overlay(tmp_path):
    base, adapters = lora_jax.split(PARAMS)
    tx = lora_jax.freeze(optax.adam(1e-2), adapters)
    state = TrainState.create(apply_fn=model, params=adapters, tx=tx)
    for _ in range(2):
        grads = jax.grad(lambda adapters: loss(lora_jax.join(base, adapters)))(state.params)
        state = state.apply_gradients(grads=grads)
    assert bits(base) == bits(BASE)
    lora_jax.save(tmp_path / "a", state.params, base=base)
    lora_jax.load(tmp_path / "a", BASE)


def test_updates_are_those_of_optax():
    tx = lora_jax.freeze(optax.adam(1e-2), PARAMS)
    updates, _ = tx.update(jax.grad(loss)(PARAMS), tx.init(PARAMS), PARAMS)
    got, want = lora_jax.apply_updates(PARAMS, updates), optax.apply_updates(PARAMS, updates)
    jax.tree.map(np.testing.assert_array_equal, trained(got), trained(want))
    same = jax.tree.map(lambda x, y, t: t or x is y, got, PARAMS, lora_jax.mask(PARAMS))
    assert all(jax.tree.leaves(same))


def test_updates_need_adapters():
    with pytest.raises(lora_jax.StructureError, match="the tree contains no adapters"):
        lora_jax.apply_updates(BASE, BASE)


# --- Arguments of `update` beyond the parameters --------------------------------------------------


def rebuilt(values):
    """Put the trained leaves into the parameters."""
    leaves, treedef = jax.tree.flatten(PARAMS)
    train = jax.tree.leaves(lora_jax.mask(PARAMS))
    found = iter(values)
    return jax.tree.unflatten(
        treedef, [next(found) if t else x for x, t in zip(leaves, train, strict=True)]
    )


def minimize(tx, fn, params, steps=4):
    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(fn)(params)
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=fn)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


FORMS = {
    "freeze": lora_jax.freeze,
    "groups": lambda tx, params: lora_jax.groups({".*": tx}, params),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_lbfgs(form):
    """It must do what it does on the trained leaves alone."""
    tx = optax.lbfgs(linesearch=optax.scale_by_backtracking_linesearch(8, store_grad=True))
    got = minimize(FORMS[form](tx, PARAMS), loss, PARAMS)
    want = minimize(tx, lambda values: loss(rebuilt(values)), trained(PARAMS))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=2e-5), trained(got), want)
    assert float(loss(got)) < 0.8 * float(loss(PARAMS))


@pytest.mark.slow
def test_lbfgs_with_its_own_line_search():
    tx = lora_jax.freeze(optax.lbfgs(), PARAMS)
    assert float(loss(minimize(tx, loss, PARAMS, steps=2))) < 0.9 * float(loss(PARAMS))


def test_value_and_gradient_from_the_state():
    """The recipe of optax's guide: the line search has computed both already."""
    tx = lora_jax.freeze(optax.lbfgs(), PARAMS)
    params, state = PARAMS, tx.init(PARAMS)
    value_and_grad = jax.jit(lora_jax.value_and_grad_from_state(loss))
    for _ in range(2):
        value, grad = value_and_grad(params, state=state)
        want = jax.value_and_grad(loss)(params)
        np.testing.assert_allclose(value, want[0], rtol=1e-5)
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5), grad, want[1])
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        params = lora_jax.apply_updates(params, updates)
    assert float(loss(params)) < 0.9 * float(loss(PARAMS))
    with pytest.raises(ValueError, match="no value and gradient"):
        lora_jax.value_and_grad_from_state(loss)(PARAMS, state=optax.adam(1.0).init(PARAMS))


def test_reduce_on_plateau():
    tx = lora_jax.freeze(
        optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=1)), PARAMS
    )
    alone = optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=1))
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    state, own = tx.init(PARAMS), alone.init(trained(PARAMS))
    for _ in range(4):
        updates, state = tx.update(ones, state, PARAMS, value=1.0)
        want, own = alone.update(trained(ones), own, trained(PARAMS), value=1.0)
        jax.tree.map(np.testing.assert_array_equal, trained(updates), want)
    assert want[0][0, 0] > -1  # the rate was reduced


def test_schedule_free():
    tx = optax.contrib.schedule_free_sgd(0.1, b1=0.9)
    frozen = lora_jax.freeze(optax.chain(optax.clip(1.0), tx), PARAMS)
    params, state = PARAMS, frozen.init(PARAMS)
    alone = optax.chain(optax.clip(1.0), tx)
    values, own = trained(PARAMS), alone.init(trained(PARAMS))
    for _ in range(3):
        updates, state = frozen.update(jax.grad(loss)(params), state, params)
        params = lora_jax.apply_updates(params, updates)
        grads = jax.grad(lambda values: loss(rebuilt(values)))(values)
        updates, own = alone.update(grads, own, values)
        values = optax.apply_updates(values, updates)
    got = lora_jax.schedule_free_eval_params(state, params)
    want = optax.contrib.schedule_free_eval_params(own[1], values)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-6), trained(got), want)
    assert got["up"]["kernel"].w is params["up"]["kernel"].w
    with pytest.raises(ValueError, match="no ScheduleFreeState"):
        lora_jax.schedule_free_eval_params(optax.adam(1.0).init(values), params)


def test_the_names_in_a_state_stay_those_of_the_parameters():
    """So that a checkpoint of an older release, whose state had adapted nodes, can be restored."""
    older = optax.multi_transform(
        {"train": optax.adam(1e-2), "freeze": optax.set_to_zero()}, lora_jax.labels
    )

    def names(tx):
        flat, _ = jax.tree_util.tree_flatten_with_path(tx.init(PARAMS), is_leaf=lambda x: x is None)
        return sorted(jax.tree_util.keystr(path, simple=True) for path, _ in flat)

    before_stacks = [name for name in names(older) if not name.endswith("slot")]
    assert names(lora_jax.freeze(optax.adam(1e-2), PARAMS)) == before_stacks
