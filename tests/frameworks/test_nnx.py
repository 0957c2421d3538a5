"""`lora.nnx`: an adapted NNX model is an NNX model, and trains as the functional form does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
import safetensors.numpy
from flax import nnx
from flax.errors import TraceContextError

import lora_jax as lora
from lora_jax import LoraConfig
from tests.programs import merged, normal

KEY = jax.random.key(0)
KEYS = KEY, jax.random.key(1)
X = normal(0, (6, 4), jnp.float32)
Y = jnp.sin(3 * X[:, :3])
CONFIG = LoraConfig(rank=2, alpha=4)
TX = optax.adamw(1e-2)  # weight decay would move a base that it sees


def kernel(key, shape, dtype, **_):
    return normal(sum(shape), shape, dtype, 0.5)


class Model(nnx.Module):
    """Statistics, dropout, a layer that is used twice, and a list of layers."""

    def __init__(self, dtype=jnp.float32, dropout=0.3):
        rngs = nnx.Rngs(0)
        kinds = {"kernel_init": kernel, "param_dtype": dtype, "rngs": rngs}
        self.up = nnx.Linear(4, 8, **kinds)
        self.norm = nnx.BatchNorm(8, param_dtype=dtype, rngs=rngs)
        self.drop = nnx.Dropout(dropout, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(8, 8, **kinds)])
        self.tied = self.blocks[0]
        self.down = nnx.Linear(8, 3, **kinds)

    def hidden(self, x):
        return self.drop(jnp.tanh(self.norm(self.up(x))))

    def __call__(self, x):
        h = self.hidden(x)
        return self.down(h + jnp.tanh(self.tied(jnp.sin(self.blocks[0](h)))))


@nnx.jit(graph_updates=False)
def step(model, opt, x, y):
    value, grads = nnx.value_and_grad(lambda model: ((model(x) - y) ** 2).mean())(model)
    opt.update(model, grads)
    return value


@nnx.jit(graph_updates=False)
def call(model, x):
    return model(x)


def by_hand(model, steps):
    """The same training in the functional form: trees, `lora.init`, `lora.lora` and optax."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def fn(params, rest, x):
        model = nnx.merge(graph, params, rest)
        return model(x), nnx.state(model, nnx.Not(nnx.Param))

    base, adapters = lora.split(lora.init(KEY, params, CONFIG, fn, rest, X))
    arrays = {path: {"a": node.a, "b": node.b} for path, node in flat(adapters).items()}
    frozen = base, {path: node.scale for path, node in flat(adapters).items()}

    def joined(arrays, frozen):
        base, scales = frozen
        nodes = {
            path: lora.LoraWeight(None, **arrays[path], scale=scales[path], layout=node.layout)
            for path, node in flat(adapters).items()
        }
        return lora.join(base, nodes)

    @jax.jit
    def update(arrays, frozen, rest, state):
        def loss(arrays):
            out, after = lora.lora(fn)(joined(arrays, frozen), rest, X)
            return ((out - Y) ** 2).mean(), after

        (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(arrays)
        updates, state = TX.update(grads, state, arrays)
        return optax.apply_updates(arrays, updates), rest, state, value

    state, values = TX.init(arrays), []
    flops = update.lower(arrays, frozen, rest, state).compile().cost_analysis()["flops"]
    for _ in range(steps):
        arrays, rest, state, value = update(arrays, frozen, rest, state)
        values.append(float(value))
    return values, joined(arrays, frozen), rest, flops


def flat(adapters):
    is_node = lambda x: isinstance(x, lora.LoraWeight)
    found = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(adapters), is_leaf=is_node)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path): node for path, node in found if is_node(node)}


@pytest.fixture(scope="module")
def trained():
    """A model, the adapted one before and after three steps, and its losses."""
    model = Model()
    tuned = lora.nnx.wrap(model, CONFIG, X)
    arrays = jax.tree.leaves(nnx.state(tuned, lora.nnx.Frozen))
    places = [x.unsafe_buffer_pointer() for x in arrays]
    copies = [np.array(x) for x in arrays]
    opt = nnx.Optimizer(tuned, TX, wrt=nnx.Param)
    flops = step.lower(tuned, opt, X, Y).compile().cost_analysis()["flops"]
    values = [float(step(tuned, opt, X, Y)) for _ in range(3)]
    return model, tuned, opt, values, (places, copies), flops


def test_the_functional_form_trains_alike(trained):
    model, tuned, _, values, _, flops = trained
    want, params, rest, want_flops = by_hand(model, 3)
    np.testing.assert_allclose(values, want, rtol=1e-6)
    assert flops <= want_flops + 1  # the optimizer counts its steps
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, nnx.to_pure_dict(tuned.params()), nnx.to_pure_dict(params))
    own = nnx.state(tuned.model, nnx.Not(lora.nnx.Frozen))  # statistics and counts moved alike
    assert int(own["drop"]["rngs"]["count"].get_value()) == 3
    jax.tree.map(close, own["norm"], rest["norm"])


def test_the_base_stays_and_is_not_copied(trained):
    model, tuned, opt, _, (places, copies), _ = trained
    arrays = jax.tree.leaves(nnx.state(tuned, lora.nnx.Frozen))
    jax.tree.map(np.testing.assert_array_equal, arrays, copies)
    assert [x.unsafe_buffer_pointer() for x in arrays] == places
    assert tuned.model.up.kernel.get_value() is model.up.kernel.get_value()
    names = {path[-2:] for path, _ in nnx.to_flat_state(nnx.state(tuned, nnx.Param))}
    assert names == {("kernel", "a"), ("kernel", "b")}
    moments = jax.tree.leaves(nnx.state(opt.opt_state))
    assert sum(x.size for x in moments) < 3 * lora.count_params(tuned).trainable
    assert int(model.drop.rngs.count.get_value()) == 0  # the model that was given is as it was
    assert float(abs(model.norm.mean.get_value()).max()) == 0


def test_merging_gives_a_model_of_its_class(trained):
    _, tuned, *_ = trained
    tuned.eval()
    plain = lora.merge(tuned)
    assert type(plain) is Model and plain.tied is plain.blocks[0] and plain.drop.deterministic
    assert all(type(x) is nnx.Param for _, x in nnx.to_flat_state(nnx.state(plain, nnx.Param)))
    oracle = nnx.clone(plain)
    nnx.update(oracle, merged(tuned.params()))
    got = call(tuned, X)
    np.testing.assert_allclose(got, call(oracle, X), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got, call(plain, X), rtol=1e-6, atol=1e-6)
    hidden = nnx.jit(lambda tuned: tuned.run(Model.hidden, X), graph_updates=False)
    want = nnx.jit(lambda plain: plain.hidden(X), graph_updates=False)(plain)
    np.testing.assert_allclose(hidden(tuned), want, rtol=1e-6, atol=1e-6)
    _, errors = lora.merge(tuned, return_error=True)
    assert set(errors) == {"up/kernel", "blocks/0/kernel", "down/kernel"}


def test_merged_in_float64(x64):
    x = normal(0, (6, 4), jnp.float64)
    model = Model(jnp.float64)
    model.eval()
    config = LoraConfig(rank=2, alpha=4, dtype=jnp.float64)
    tuned = lora.nnx.wrap(model, config, x)
    for factors in (tuned.adapters.up.kernel, tuned.adapters.blocks["0"].kernel):
        factors.b.set_value(normal(3, factors.b.shape, jnp.float64))
    oracle = nnx.clone(model)
    nnx.update(oracle, merged(tuned.params()))
    got = call(tuned, x)
    np.testing.assert_allclose(got, call(oracle, x), rtol=1e-12, atol=1e-12)
    assert np.abs(got - call(model, x)).max() > 0.1


def test_files_and_checkpoints(trained, tmp_path):
    model, tuned, *_ = trained
    tuned.eval()
    lora.save(tmp_path / "a", tuned, config=CONFIG)
    statistics = nnx.state(tuned.model, nnx.BatchStat)
    again = lora.nnx.join(model, lora.load(tmp_path / "a", nnx.state(model, nnx.Param)))
    nnx.update(again.model, statistics)
    again.eval()
    want = call(tuned, X)
    np.testing.assert_array_equal(call(again, X), want)

    checkpointer = orbax.checkpoint.StandardCheckpointer()
    checkpointer.save(tmp_path / "b", nnx.state(tuned, (nnx.Param, nnx.BatchStat)))
    checkpointer.wait_until_finished()
    fresh = lora.nnx.wrap(model, CONFIG, X)
    like = nnx.state(fresh, (nnx.Param, nnx.BatchStat))
    nnx.update(fresh, checkpointer.restore(tmp_path / "b", like))
    fresh.eval()
    np.testing.assert_array_equal(call(fresh, X), want)


def test_peft_files(trained, tmp_path):
    model, tuned, *_ = trained
    naming = lora.naming.Naming(
        (
            lora.naming.Entry("blocks.{n}.weight", "blocks/{n}/kernel", "linear"),
            lora.naming.Entry("{m}.weight", "{m}/kernel", "linear"),
        )
    )
    lora.peft.save(tmp_path, tuned.params(), naming, config=CONFIG)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    want = tuned.adapters.blocks["0"].kernel.a.get_value().T  # PEFT keeps [rank, in]
    np.testing.assert_array_equal(tensors["base_model.model.blocks.0.lora_A.weight"], want)
    adapters = lora.peft.load(tmp_path, nnx.state(model, nnx.Param), naming)
    again = lora.nnx.join(model, adapters)
    same = lambda x, y: np.testing.assert_array_equal(x, y)
    jax.tree.map(same, nnx.state(again, nnx.Param), nnx.state(tuned, nnx.Param))


def test_putting_other_values(trained):
    _, tuned, *_ = trained
    tuned.eval()
    params, out = tuned.params(), call(tuned, X)
    tuned.put(lora.disable(params))
    plain = lora.merge(tuned)
    np.testing.assert_array_equal(call(tuned, X), call(plain, X))
    tuned.put(lora.split(params)[1])
    np.testing.assert_array_equal(call(tuned, X), out)
    other = lora.nnx.wrap(Model(), LoraConfig(rank=1, targets=["up/kernel"]), X)
    message = r"only one of the two has an adapter\n.*up/kernel: a is float32\[4, 1\], here it is"
    with pytest.raises(lora.StructureError, match=message):
        tuned.put(other.params())


class Sown(nnx.Module):
    """Random numbers from an argument, names that are no arrays, and values that are sown."""

    def __init__(self):
        self.up = nnx.Linear(4, 4, kernel_init=kernel, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(0.5)
        self.seen = nnx.Intermediate(jnp.zeros((6, 4)))

    def __call__(self, x, *, rngs, activation="tanh"):
        h = self.drop(getattr(jnp, activation)(self.up(x)), rngs=rngs)
        self.seen.set_value(h)
        self.last = nnx.Intermediate(h.sum())
        return h


@functools.partial(nnx.jit, static_argnums=3)
def called(model, x, rngs, activation="tanh"):
    return model(x, rngs=rngs, activation=activation)


def test_arguments_that_change():
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    tuned = lora.nnx.wrap(Sown(), LoraConfig(rank=1), shape, rngs=nnx.Rngs(1), activation="sin")
    rngs = nnx.Rngs(1)
    first = called(tuned, X, rngs)
    second = called(tuned, X, rngs, "sin")
    assert int(rngs.default.count.get_value()) == 2 and not np.array_equal(first, second)
    plain, again = Sown(), nnx.Rngs(1)
    np.testing.assert_allclose(first, called(plain, X, again), rtol=1e-6)
    np.testing.assert_array_equal(tuned.model.seen.get_value(), second)
    assert float(nnx.pop(tuned, nnx.Intermediate)["model"]["last"].get_value()) == second.sum()


def test_a_change_where_a_trace_may_not():
    tuned = lora.nnx.wrap(Model(), CONFIG, X)
    with pytest.raises(TraceContextError, match=r"Cannot mutate .* from a different trace level"):
        jax.jit(lambda x: tuned(x))(X)


class Stack(nnx.Module):
    """Three layers in one, scanned with filters that name `nnx.Param`."""

    def __init__(self):
        self.layers = nnx.Linear(4, 4, kernel_init=kernel, rngs=nnx.Rngs(0))
        self.layers.kernel.set_value(normal(1, (3, 4, 4), jnp.float32, 0.5))
        self.layers.bias.set_value(normal(2, (3, 4), jnp.float32, 0.5))

    def __call__(self, x):
        axes = nnx.StateAxes({nnx.Param: 0, ...: None})
        body = lambda layer, x: jnp.tanh(layer(x))
        return nnx.scan(body, in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)


def test_layers_in_one_stack_with_magnitudes_dropout_and_biases():
    config = LoraConfig(rank=2, dora=True, dropout=0.5, train=["layers/bias"])
    model = Stack()
    tuned = lora.nnx.wrap(model, config, X, init_key=nnx.Rngs(params=3))
    factors = tuned.adapters.layers.kernel
    assert factors.a.shape == (3, 4, 2) and factors.magnitude.shape == (3, 4)
    factors.b.set_value(normal(1, factors.b.shape, jnp.float32))
    tuned.adapters.layers.bias.value.set_value(normal(2, (3, 4), jnp.float32))
    first, second = call(tuned, X), call(tuned, X)
    assert not np.array_equal(first, second) and int(tuned.rngs.dropout.count.get_value()) == 2
    tuned.eval()
    np.testing.assert_allclose(call(tuned, X), call(lora.merge(tuned), X), rtol=1e-5, atol=1e-6)


def test_optimizers_of_lora():
    """A has the rate, and B sixteen times that, as optax computes them by hand."""
    tuned = lora.nnx.wrap(Model(dropout=0.0), CONFIG, X)
    tuned.eval()
    decayed = lambda rate: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(rate))
    make = lambda adapters: lora.lora_plus(0.5, adapters, 16, decayed)
    opt = nnx.Optimizer(tuned, lora.nnx.transform(tuned, make), wrt=nnx.Param)
    before = nnx.state(nnx.clone(tuned), nnx.Param)
    grads = nnx.jit(nnx.grad(lambda model: model(X).sum()))(tuned)
    opt.update(tuned, grads)
    for name in ("up", "down"):
        own, old, new = (
            tree["adapters"][name]["kernel"]
            for tree in (grads, before, nnx.state(tuned, nnx.Param))
        )
        for field, rate in (("a", 0.5), ("b", 8.0)):
            x = old[field].get_value()
            want = x - rate * (own[field].get_value() + 0.1 * x)
            np.testing.assert_allclose(new[field].get_value(), want, rtol=1e-5, atol=1e-6)
    assert float(abs(grads["adapters"]["down"]["kernel"]["b"].get_value()).max()) > 0


def test_two_models_share_a_compiled_step():
    rules = {"mine": lora.Rule(lambda *_: None, {0: "io"})}
    one, two = (lora.nnx.wrap(Model(), CONFIG, X, rules=rules, init_key=key) for key in KEYS)
    assert nnx.graphdef(one) == nnx.graphdef(two) and hash(nnx.graphdef(one)) is not None
    assert nnx.graphdef(one) != nnx.graphdef(lora.nnx.wrap(Model(), CONFIG, X))


def test_a_base_that_an_initializer_changed_is_that_of_the_model():
    model = nnx.Linear(4, 3, kernel_init=kernel, rngs=nnx.Rngs(0))
    params = lora.nnx.wrap(model, CONFIG, X).params()
    is_node = lambda x: isinstance(x, lora.LoraWeight)
    moved = lambda x: dataclasses.replace(x, w=x.w + 1) if is_node(x) else x
    joined = lora.nnx.join(model, jax.tree.map(moved, params, is_leaf=is_node))
    np.testing.assert_array_equal(joined.model.kernel.get_value(), model.kernel.get_value() + 1)


class Outer(nnx.Module):
    def __init__(self, inner):
        self.inner, self.head = inner, nnx.Linear(3, 2, kernel_init=kernel, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.head(self.inner(x))


def test_a_part_of_a_larger_model():
    outer = Outer(lora.nnx.wrap(Model(), CONFIG, X))
    outer.eval()
    assert outer.inner.model.norm.use_running_average and outer.inner.model.drop.deterministic
    names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(outer, nnx.Param))]
    assert names[:2] == ["head.bias", "head.kernel"] and len(names) == 8
    assert all(name.startswith("inner.adapters.") for name in names[2:])


@pytest.mark.slow
def test_a_quantized_base_in_a_larger_model():
    model = lora.quantize(Model(dropout=0.0), "int8", lambda model, x: model(x), X)
    outer = Outer(lora.nnx.wrap(model, CONFIG, X))
    assert isinstance(outer.inner.model.up.kernel.get_value(), lora.QuantizedWeight)
    opt = nnx.Optimizer(outer, optax.adam(1e-2), wrt=nnx.Param)
    values = [float(step(outer, opt, X, Y[:, :2])) for _ in range(3)]
    assert values[2] < values[0]
    outer.eval()
    plain = lora.merge(outer.inner)
    assert isinstance(plain.up.kernel.get_value(), jax.Array)
    np.testing.assert_allclose(call(plain, X), call(outer.inner, X), rtol=1e-4, atol=1e-5)


def test_errors_say_what_to_do():
    tuned = lora.nnx.wrap(Model(), CONFIG, X)
    with pytest.raises(lora.ConfigError, match=r"wrap: the model is wrapped already. Merge it"):
        lora.nnx.wrap(tuned, CONFIG, X)
    with pytest.raises(lora.ConfigError, match="wrap: pass a model of Flax NNX, got dict"):
        lora.nnx.wrap({"kernel": X}, CONFIG, X)
    with pytest.raises(lora.ConfigError, match=r"Dropout has no nnx.Param, so nothing to adapt"):
        lora.nnx.wrap(nnx.Dropout(0.5), CONFIG, X)
    with pytest.raises(lora.TargetError, match=r"'middle' matches no path; nearest paths: norm"):
        lora.nnx.wrap(Model(), LoraConfig(targets=["middle"]), X)
    with pytest.raises(lora.StructureError, match=r"Adapted is a model.*pass model.params\(\)"):
        lora.disable(tuned)
    with pytest.raises(lora.StructureError, match="join: the adapters do not fit the base"):
        lora.nnx.join(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), lora.split(tuned)[1])
