"""`lora.equinox`: an adapted module is a module, and trains as the functional form does."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from lora_jax import LoraConfig
from tests.programs import merged, normal, randomize

KEY = jax.random.key(0)
X = normal(0, (6, 4), jnp.float32)
Y = jnp.sin(3 * X[:, :3])
KEYS = jax.random.split(jax.random.key(1), len(X))
CONFIG = LoraConfig(rank=2, alpha=4)
TX = optax.adamw(1e-2)


class Net(eqx.Module):
    """Statistics, dropout, and a function among the leaves."""

    mlp: eqx.nn.MLP
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout
    down: eqx.nn.Linear

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.mlp = eqx.nn.MLP(4, 8, 8, 1, key=first)
        self.norm = eqx.nn.BatchNorm(8, "batch", mode="batch")
        self.drop = eqx.nn.Dropout(0.3)
        self.down = eqx.nn.Linear(8, 3, key=second)

    def __call__(self, x, state, key):
        h, state = self.norm(self.mlp(x), state)
        return self.down(self.drop(jnp.tanh(h), key=key)), state


def batched(net, x, state, keys):
    run = jax.vmap(net, in_axes=(0, None, 0), out_axes=(0, None), axis_name="batch")
    return run(x, state, keys)


@eqx.filter_jit
def step(trained, frozen, state, opt, x, y, keys):
    def loss(trained):
        out, after = eqx.combine(trained, frozen)(x, state, keys)
        return ((out - y) ** 2).mean(), after

    (value, state), grads = eqx.filter_value_and_grad(loss, has_aux=True)(trained)
    updates, opt = TX.update(grads, opt, trained)
    return eqx.apply_updates(trained, updates), state, opt, value


@eqx.filter_jit
def on_batch(net, x):
    return jax.vmap(net)(x)


def drawn(make):
    """Return a module with random weights, without compiling what draws them."""
    shapes = eqx.filter_eval_shape(make)
    draw = lambda x: normal(x.size, x.shape, x.dtype, 0.5)
    is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)
    return jax.tree.map(lambda x: draw(x) if is_shape(x) else x, shapes)


def by_hand(net, state, steps):
    """The same training in the functional form: `lora.init`, `lora.lora`, `lora.freeze`."""
    params = lora.init(KEY, net, CONFIG, batched, X, state, KEYS)
    arrays, static = eqx.partition(params, eqx.is_array)
    tx = lora.freeze(TX, arrays)

    @jax.jit
    def update(arrays, state, opt, x, y, keys):
        def loss(arrays):
            out, after = lora.lora(batched)(eqx.combine(arrays, static), x, state, keys)
            return ((out - y) ** 2).mean(), after

        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(arrays)
        updates, opt = tx.update(grads, opt, arrays)
        return lora.apply_updates(arrays, updates), state, opt, value

    opt, values = tx.init(arrays), []
    flops = update.lower(arrays, state, opt, X, Y, KEYS).compile().cost_analysis()["flops"]
    for _ in range(steps):
        arrays, state, opt, value = update(arrays, state, opt, X, Y, KEYS)
        values.append(float(value))
    return values, eqx.combine(arrays, static), flops


@pytest.fixture(scope="module")
def trained():
    net, state = eqx.nn.make_with_state(Net)(KEY)
    tuned = lora.equinox.wrap(net, CONFIG, X, state, KEYS, fn=batched)
    first, frozen = lora.equinox.partition(tuned)
    arguments = first, frozen, state, TX.init(first), X, Y, KEYS
    flops = step.lower(*arguments).compile().compiled.cost_analysis()["flops"]
    values, now, after, opt = [], first, state, arguments[3]
    for _ in range(3):
        now, after, opt, value = step(now, frozen, after, opt, X, Y, KEYS)
        values.append(float(value))
    return net, state, eqx.combine(now, frozen), after, values, flops


def test_the_functional_form_trains_alike(trained):
    net, state, tuned, _, values, flops = trained
    want, params, want_flops = by_hand(net, state, 3)
    np.testing.assert_allclose(values, want, rtol=1e-6)
    assert values[2] < values[0] and flops <= want_flops
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, *(eqx.filter(tree, eqx.is_array) for tree in (tuned.model, params)))


def test_the_base_stays_and_merging_gives_a_model_of_its_class(trained):
    net, _, tuned, state, *_ = trained
    base, _ = lora.split(tuned)
    assert base.down.weight is net.down.weight and base.norm.weight is net.norm.weight
    tuned = eqx.nn.inference_mode(tuned)
    plain = lora.merge(tuned)
    assert type(plain) is Net and plain.drop.inference
    run = eqx.filter_jit(lambda net: net(X, state, KEYS)[0])
    plainly = eqx.filter_jit(lambda net: batched(net, X, state, KEYS)[0])
    got = run(tuned)
    np.testing.assert_allclose(got, plainly(merged(tuned.model)), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(got, plainly(plain), rtol=1e-6, atol=1e-7)
    off = run(lora.disable(tuned))
    want = plainly(eqx.nn.inference_mode(net))
    np.testing.assert_allclose(off, want, rtol=1e-6, atol=1e-7)


def test_merged_in_float64_under_vmap(x64):
    net = drawn(lambda: eqx.nn.MLP(4, 3, 8, 1, dtype=jnp.float64, key=KEY))
    x = normal(0, (6, 4), jnp.float64)
    config = LoraConfig(rank=2, alpha=4, dtype=jnp.float64)
    tuned = randomize(lora.equinox.wrap(net, config, x[0]))
    got = on_batch(tuned, x)
    np.testing.assert_allclose(got, on_batch(merged(tuned.model), x), rtol=1e-12)
    assert np.abs(got - on_batch(net, x)).max() > 0.1


def test_files_and_leaves(trained, tmp_path):
    net, state, tuned, *_ = trained
    same = lambda x, y: np.testing.assert_array_equal(x, y)
    arrays = lambda tree: eqx.filter(tree, eqx.is_array)
    eqx.tree_serialise_leaves(tmp_path / "whole.eqx", tuned)
    fresh = lora.equinox.wrap(net, CONFIG, X, state, KEYS, fn=batched)
    again = eqx.tree_deserialise_leaves(tmp_path / "whole.eqx", fresh)
    jax.tree.map(same, arrays(again), arrays(tuned))
    lora.save(tmp_path / "native", tuned, config=CONFIG)
    again = lora.equinox.join(net, lora.load(tmp_path / "native", net), fn=batched)
    assert jax.tree.structure(arrays(again)) == jax.tree.structure(arrays(tuned))
    jax.tree.map(same, arrays(again), arrays(tuned))
    assert lora.summary(again).startswith("path                 shape   layout")


class Tied(eqx.Module):
    """A head that is the embedding."""

    shared: eqx.nn.Shared

    def __init__(self):
        layers = eqx.nn.Embedding(5, 4, key=KEY), eqx.nn.Linear(4, 5, use_bias=False, key=KEY)
        of = lambda layers: layers[1].weight
        self.shared = eqx.nn.Shared(layers, of, lambda layers: layers[0].weight)

    def __call__(self, token):
        embedding, head = self.shared()
        return head(jnp.tanh(embedding(token)))


def test_a_tied_head_is_adapted_once():
    tokens = jnp.arange(5)
    net = drawn(Tied)
    tuned = randomize(lora.equinox.wrap(net, LoraConfig(rank=1), tokens[0]))
    assert [*lora.count_params(tuned)] == [9, 29]
    got = on_batch(tuned, tokens)
    np.testing.assert_allclose(got, on_batch(lora.merge(tuned), tokens), rtol=1e-6, atol=1e-7)
    assert np.abs(got - on_batch(net, tokens)).max() > 0.1


def test_two_models_share_a_compiled_step():
    net, rules = drawn(lambda: eqx.nn.Linear(4, 3, key=KEY)), {"mine": lora.Rule(print, {0: "io"})}
    wrap = lambda key: lora.equinox.wrap(net, CONFIG, X[0], rules=rules, init_key=key)
    one, two = map(jax.tree.structure, map(wrap, (KEY, KEYS[0])))
    assert one == two and hash(one) == hash(two)


def test_errors_say_what_to_do():
    net = drawn(lambda: eqx.nn.Linear(4, 3, key=KEY))
    tuned = lora.equinox.wrap(net, LoraConfig(rank=1), X[0])
    with pytest.raises(lora.ConfigError, match=r"wrap: the model is wrapped already\. Merge it"):
        lora.equinox.wrap(tuned, CONFIG, X[0])
    with pytest.raises(lora.ConfigError, match="join: pass a model of Equinox, got dict"):
        lora.equinox.join({"kernel": X}, tuned)
    with pytest.raises(lora.StructureError, match="partition: the tree contains no adapters"):
        lora.equinox.partition(net)
    with pytest.raises(lora.StructureError, match="join: the adapters do not fit the base"):
        lora.equinox.join(eqx.nn.Linear(5, 3, key=KEY), lora.split(tuned)[1])
