"""Models of NNX and Equinox of many kinds, wrapped, compute what the functional form computes."""

import copy
import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lora
from lora_jax import LoraConfig
from tests.programs import normal, randomize

KEY = jax.random.key(0)
CONFIG = LoraConfig(rank=2, alpha=4)
X = normal(0, (6, 4), jnp.float32)
SEQUENCES = normal(1, (3, 5, 4), jnp.float32)
pytestmark = pytest.mark.usefixtures("quick_compile")


def close(found, wanted, atol=1e-5):
    for x, y in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(*(np.asarray(z, np.float32) for z in (x, y)), atol=atol)


# --- NNX ------------------------------------------------------------------------------------------


class Calls(nnx.Module):
    """Parts, and a function of the model and its inputs."""

    def __init__(self, call, **parts):
        self.call = nnx.static(call)
        for name, part in parts.items():
            setattr(self, name, part)

    def __call__(self, *args):
        return self.call(self, *args)


class Block(nnx.Module):
    """State of each kind: statistics and a stream of random numbers."""

    def __init__(self, rngs):
        self.dense, self.norm = nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x):
        return self.drop(jnp.tanh(self.norm(self.dense(x))))


def linear(out=4, seed=0, **more):
    return nnx.Linear(4, out, rngs=nnx.Rngs(seed), **more)


def several(make):
    """Return three modules in one, as `nnx.vmap` makes them."""
    return nnx.split_rngs(splits=3)(nnx.vmap(make, in_axes=0, out_axes=0))(nnx.Rngs(0))


def containers():
    def call(m, x):
        h = m.by_name["q"](x) + m.by_name["k"](x) * m.constant
        for layer in m.layers:
            h = h if layer is None else jnp.tanh(layer(h))
        return m.end(h)

    layers = nnx.List([linear(seed=2), None, linear(seed=3)])
    return Calls(
        call,
        by_name=nnx.Dict({"q": linear(use_bias=False), "k": linear(seed=1)}),
        layers=layers,
        again=layers[0],  # a module with two names
        constant=nnx.data(jnp.full((1, 4), 0.5)),
        nothing=None,
        end=nnx.Sequential(linear(), jnp.tanh, linear(2)),
    )


def scanned():
    run = nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    return Calls(lambda m, x: run(m.layers, x), layers=several(Block))


def heads():
    run = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None), out_axes=0)
    return Calls(
        lambda m, x: run(m.heads, x), heads=several(lambda rngs: nnx.Linear(4, 2, rngs=rngs))
    )


def rematerialized():
    inner = nnx.remat(lambda m, x: m.block(x))
    return Calls(lambda m, x: m.end(inner(m, x)), block=Block(nnx.Rngs(0)), end=linear(3))


def branches():
    def call(m, x):
        y = nnx.cond(x.sum() > 0, lambda m, x: m.a(x), lambda m, x: m.b(x), m, x)
        return nnx.fori_loop(0, 2, lambda i, c: (c[0], jnp.tanh(c[0].a(c[1]))), (m, y))[1]

    return Calls(call, a=linear(), b=linear(seed=1))


def recurrent():
    cells = nnx.LSTMCell(4, 3, rngs=nnx.Rngs(0)), nnx.GRUCell(4, 3, rngs=nnx.Rngs(1))
    both = nnx.Bidirectional(*map(nnx.RNN, cells), rngs=nnx.Rngs(2))
    return Calls(lambda m, x: m.both(x), both=both)


def half():
    kinds = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    norm = nnx.LayerNorm(4, rngs=nnx.Rngs(0), **kinds)
    return Calls(lambda m, x: m.b(m.norm(m.a(x))), a=linear(**kinds), norm=norm, b=linear(**kinds))


def shared_variable():
    a, b = linear(), linear(seed=1)
    b.kernel = a.kernel
    return Calls(lambda m, x: m.b(jnp.tanh(m.a(x))), a=a, b=b)


def attention():
    made = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
    return Calls(lambda m, x: m.attention(x), attention=made)


SLOW = pytest.mark.slow
NNX = [
    pytest.param(make, x, id=make.__name__, marks=marks)
    for make, x, marks in (
        (containers, X, ()),
        (scanned, X, SLOW),
        (heads, X, SLOW),
        (rematerialized, X, SLOW),
        (branches, X, SLOW),
        (recurrent, SEQUENCES, SLOW),
        (attention, SEQUENCES, SLOW),
        (shared_variable, X, SLOW),
        (half, X.astype(jnp.bfloat16), SLOW),
    )
]


def wrapped(model, *args, **options):
    """Return an adapted model whose B is not zero."""
    tuned = lora.nnx.wrap(model, CONFIG, *args, **options)
    tuned.put(randomize(tuned.params()))
    return tuned


@pytest.mark.parametrize(("make", "x"), NNX)
def test_nnx(make, x):
    """What is returned and what changes in the model, in training; then the merged model."""
    model = make()
    tuned = wrapped(model, x)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def functional(params, rest, x):
        own = nnx.merge(graph, params, rest)
        return own(x), nnx.state(own, nnx.Not(nnx.Param))

    joined = lora.join(params, lora.split(tuned.params())[1])
    want, after = jax.jit(lora.lora(functional))(joined, rest, x)
    run = nnx.jit(lambda model, x: model(x), graph_updates=False)
    atol = 1e-5 if x.dtype == jnp.float32 else 0.1
    close(run(tuned, x), want, 1e-6)
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    own = nnx.state(tuned.model, nnx.Not(lora.nnx.Frozen))
    close(*(jax.tree.map(plain, nnx.to_pure_dict(state)) for state in (own, after)))
    gradients = nnx.eval_shape(nnx.grad(lambda model: model(x).astype(jnp.float32).sum()), tuned)
    sizes = [g.size for g in jax.tree.leaves(gradients)]
    assert sum(sizes) == lora.count_params(tuned).trainable
    tuned.eval()
    close(run(tuned, x), run(tuned.merge(), x), atol)


def test_copies_views_and_parts_of_an_nnx_model():
    config = dataclasses.replace(CONFIG, dropout=0.5)
    tuned = lora.nnx.wrap(rematerialized(), config, X)
    other = copy.deepcopy(tuned)
    other.adapters.end.kernel.b.set_value(other.adapters.end.kernel.b.get_value() + 1)
    assert float(abs(tuned.adapters.end.kernel.b.get_value()).max()) == 0
    view = nnx.view(tuned, deterministic=True, use_running_average=True)
    switches = view.deterministic, view.model.block.drop.deterministic
    assert switches == (True, True) and not tuned.deterministic
    assert view.adapters.end.kernel.a is tuned.adapters.end.kernel.a
    graph, trained, frozen, rest = nnx.split(tuned, lora.nnx.Trained, lora.nnx.Frozen, ...)
    assert len(jax.tree.leaves(trained)) == 4 and len(jax.tree.leaves(frozen)) == 8
    again = nnx.merge(graph, trained, frozen, rest)
    assert nnx.graphdef(again) == nnx.graphdef(tuned)


def test_rules_and_policies_hold_in_every_call():
    model = Calls(lambda m, x: x @ jnp.sin(m.w.get_value()), w=nnx.Param(jnp.ones((4, 3))))
    config = dataclasses.replace(CONFIG, targets=["w"])
    shape = lambda **more: nnx.eval_shape(lora.nnx.wrap(model, config, X, **more), X)
    with pytest.raises(lora.DenseError, match=r"w: .*sin"):
        shape(on_dense="error")
    seen = []
    apply = lambda call, w: seen.append(w.a.shape) or call(w.w)
    assert shape(on_dense="error", rules={"sin": lora.Rule(apply, {0: "io"})}).shape == (6, 3)
    assert seen == [(4, 2)]


# --- Equinox --------------------------------------------------------------------------------------


class Runs(eqx.Module):
    """Parts, and a function of them and the inputs."""

    parts: dict
    call: Callable = eqx.field(static=True)
    nothing: None = None

    def __call__(self, *args):
        return self.call(self.parts, *args)


def dense(out=4, seed=0, **more):
    return eqx.nn.Linear(4, out, key=jax.random.key(seed), **more)


def layers(make):
    return eqx.filter_vmap(make)(jax.random.split(KEY, 3))


def in_a_scan():
    def call(parts, x):
        arrays, static = eqx.partition(parts["layers"], eqx.is_array)
        step = eqx.filter_checkpoint(lambda x, a: jnp.tanh(eqx.combine(a, static)(x)))
        return jax.lax.scan(lambda x, a: (step(x, a), None), x, arrays)[0]

    return Runs({"layers": layers(lambda key: eqx.nn.MLP(4, 4, 8, 1, key=key))}, call)


def an_ensemble():
    run = eqx.filter_vmap(lambda m, x: m(x), in_axes=(eqx.if_array(0), None))
    made = layers(lambda key: eqx.nn.Linear(4, 2, use_bias=False, key=key))
    return Runs({"heads": made, "none": [None]}, lambda parts, x: run(parts["heads"], x))


def a_recurrence():
    def call(parts, xs):
        step = lambda h, x: (parts["cell"](x, h), None)
        return jax.lax.scan(step, jnp.zeros(4), xs)[0]

    return Runs({"cell": eqx.nn.GRUCell(4, 4, key=KEY)}, call)


def of_sixteen_bits():
    return eqx.nn.MLP(4, 3, 8, 2, dtype=jnp.bfloat16, key=KEY)


def heads_of_attention():
    made = eqx.nn.MultiheadAttention(2, 4, key=KEY)
    return Runs({"attention": made}, lambda parts, x: parts["attention"](x, x, x))


EQUINOX = [
    pytest.param(make, x, id=make.__name__, marks=marks)
    for make, x, marks in (
        (an_ensemble, X[0], SLOW),
        (in_a_scan, X[0], SLOW),
        (a_recurrence, SEQUENCES[0], SLOW),
        (heads_of_attention, SEQUENCES[0], SLOW),
        (of_sixteen_bits, X[0].astype(jnp.bfloat16), SLOW),
    )
]


@pytest.mark.parametrize(("make", "x"), EQUINOX)
def test_equinox(make, x):
    model = make()
    tuned = randomize(lora.equinox.wrap(model, CONFIG, x))
    run = eqx.filter_jit(lambda model, x: model(x))
    found = run(tuned, x)
    arrays, static = eqx.partition(tuned.model, eqx.is_array)
    functional = lora.lora(lambda params, x: eqx.combine(params, static)(x))
    close(found, jax.jit(functional)(arrays, x), 1e-6)
    close(found, run(tuned.merge(), x), 1e-5 if x.dtype == jnp.float32 else 0.1)
    trained, frozen = lora.equinox.partition(tuned)
    gradients = eqx.filter_grad(lambda t: eqx.combine(t, frozen)(x).astype(jnp.float32).sum())
    sizes = [g.size for g in jax.tree.leaves(eqx.filter_eval_shape(gradients, trained))]
    assert sum(sizes) == lora.count_params(tuned).trainable


class Counts(eqx.Module):
    """A count, and a constant that each call writes into the state."""

    dense: eqx.nn.Linear
    count: eqx.nn.StateIndex
    is_first: eqx.nn.StateIndex

    def __init__(self):
        self.dense = dense()
        self.count = eqx.nn.StateIndex(jnp.array(0))
        self.is_first = eqx.nn.StateIndex(jnp.array(True))

    def __call__(self, x, state):
        state = state.set(self.count, state.get(self.count) + 1)
        return self.dense(x), state.set(self.is_first, jnp.array(False))


def test_a_state_of_constants():
    model, state = eqx.nn.make_with_state(Counts)()
    tuned = lora.equinox.wrap(model, CONFIG, X[0], state)
    run = eqx.filter_jit(lambda model, x, state: model(x, state))
    _, after = run(tuned, X[0], state)
    assert isinstance(after.get(model.is_first), jax.Array) and not after.get(model.is_first)
    assert int(after.get(model.count)) == 1
