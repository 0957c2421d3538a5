"""`nnx.Optimizer` trains an adapted model, in every form of `freeze`, jitted and not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lora_jax
from lora_jax import LoraWeight
from tests.programs import normal

X = normal(0, (6, 4), jnp.float32)
Y = jnp.sin(3 * X[:, :3])


class Model(nnx.Module):
    def __init__(self, dropout=0.0):
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(4, 8, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(8, 8, rngs=rngs)])
        self.down = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.up(x))
        for block in self.blocks:
            x = x + jnp.tanh(block(self.dropout(x)))
        return self.down(x)


def call(model, x):
    return model(x)


def adapted(config=None, **kwargs):
    config = config or lora_jax.LoraConfig(rank=2, alpha=4)
    return lora_jax.init(jax.random.key(0), Model(**kwargs), config, call, X)


def loss(model, x, y):
    return ((lora_jax.lora(call)(model, x) - y) ** 2).mean()


TX = optax.adam(1e-2)
FORMS = {
    "freeze": lambda q: lora_jax.freeze(TX, q),
    "freeze_state": lambda q: lora_jax.freeze(TX, nnx.state(q, nnx.Param)),
    "freeze_chain": lambda q: optax.chain(
        optax.clip_by_global_norm(100.0), lora_jax.freeze(TX, q), optax.identity()
    ),
    "only": lambda q: lora_jax.freeze(TX, q, only=("a", "b")),
    "groups": lambda q: lora_jax.groups({"up": TX, r"blocks/.*": TX}, q, default=TX),
    "lora_plus": lambda q: lora_jax.lora_plus(1e-2, q, 1.0, optax.adam),
}


def pure(tree):
    return nnx.to_pure_dict(nnx.state(tree, nnx.Param))


def by_hand(q, steps):
    """The same training without `nnx.Optimizer`, of the trained arrays alone."""
    graph, params, rest = nnx.split(q, nnx.Param, ...)
    leaves, treedef = jax.tree.flatten(params)
    train = jax.tree.leaves(lora_jax.mask(params))

    def of(values):
        found = iter(values)
        new = [next(found) if t else x for x, t in zip(leaves, train, strict=True)]
        return nnx.merge(graph, jax.tree.unflatten(treedef, new), rest)

    values = [x for x, t in zip(leaves, train, strict=True) if t]
    state, losses = TX.init(values), []
    for _ in range(steps):
        value, grads = jax.value_and_grad(lambda v: loss(of(v), X, Y))(values)
        updates, state = TX.update(grads, state)
        values = optax.apply_updates(values, updates)
        losses.append(float(value))
    return losses


@pytest.fixture(scope="module")
def expected():
    return by_hand(adapted(), 3)


SLOW = ("freeze_state", "only")


@pytest.mark.parametrize(
    "form", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in FORMS]
)
def test_three_updates(form, expected):
    check_three_updates(form, lambda step: nnx.jit(step), expected)


@pytest.mark.parametrize("form", ["freeze", pytest.param("freeze_chain", marks=pytest.mark.slow)])
def test_three_updates_without_jit(form, expected):
    check_three_updates(form, lambda step: step, expected)


def check_three_updates(form, compiled, expected):
    q = adapted()
    opt = nnx.Optimizer(q, FORMS[form](q), wrt=nnx.Param)

    def step(q, opt, x, y):
        value, grads = nnx.value_and_grad(loss)(q, x, y)
        opt.update(q, grads)
        return value

    step = compiled(step)
    losses = [float(step(q, opt, X, Y)) for _ in range(3)]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses[2] < losses[0]
    assert isinstance(q.up.kernel.get_value(), LoraWeight)
    jax.tree.map(np.testing.assert_array_equal, pure(lora_jax.split(q)[0]), pure(Model()))
    assert isinstance(nnx.state(opt.opt_state), nnx.State)  # checkpoints read it
    merged = lora_jax.merge(q)
    np.testing.assert_allclose(merged(X), lora_jax.lora(call)(q, X), rtol=1e-4, atol=1e-5)


def test_magnitudes_and_whole_leaves_train_too():
    q = adapted(lora_jax.LoraConfig(rank=2, dora=True, train=["down/kernel"], bias="adapted"))
    opt = nnx.Optimizer(q, lora_jax.freeze(TX, q), wrt=nnx.Param)
    values = []
    for _ in range(3):
        value, grads = nnx.value_and_grad(loss)(q, X, Y)
        opt.update(q, grads)
        values.append(float(value))
    assert values[2] < values[0]
    assert float(abs(q.down.kernel.get_value().value - Model().down.kernel[...]).max()) > 1e-3


def test_a_model_with_dropout_takes_new_numbers_each_step():
    q = adapted(dropout=0.5)

    def noisy(model, x, key):
        nnx.reseed(model, default=key)
        return model(x)

    @nnx.jit
    def step(q, opt, x, y, key):
        noisy_loss = lambda q: ((lora_jax.lora(noisy)(q, x, key) - y) ** 2).mean()
        value, grads = nnx.value_and_grad(noisy_loss)(q)
        opt.update(q, grads)
        return value

    opt = nnx.Optimizer(q, lora_jax.freeze(optax.sgd(0.0), q), wrt=nnx.Param)
    first, second, again = (float(step(q, opt, X, Y, jax.random.key(i))) for i in (1, 2, 1))
    assert first != second and first == again
    model = Model(dropout=0.5)
    nnx.reseed(model, default=jax.random.key(1))
    np.testing.assert_allclose(first, ((model(X) - Y) ** 2).mean(), rtol=1e-5)


def test_files_of_a_model(tmp_path):
    q = adapted()
    lora_jax.save(tmp_path / "a", q)
    again = lora_jax.join(Model(), lora_jax.load(tmp_path / "a", Model()))
    jax.tree.map(np.testing.assert_array_equal, pure(again), pure(q))
