"""One transformation for every framework: a transformer block in each, adapted and trained."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lora_jax
from tests.programs import is_node, merged, normal, randomize

KEY = jax.random.key(0)
WIDTH, HEADS, HIDDEN = 8, 2, 12
X = normal(0, (3, 5, WIDTH), jnp.float32)


def drawn(shapes):
    """Return random numbers in these shapes, without compiling anything."""
    leaves, treedef = jax.tree.flatten(shapes)
    leaves = [normal(i, x.shape, x.dtype, 1 / (1 + x.ndim)) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(treedef, leaves)


def ones(shapes):
    """Fill a state; a variance must be positive."""
    return jax.tree.map(lambda x: jax.device_put(np.ones(x.shape, x.dtype)), shapes)


# --- Flax Linen: collections that change, random keys ---------------------------------------------


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="attn")(h, h, h)
        h = nn.gelu(nn.Dense(HIDDEN, name="up")(nn.BatchNorm(not train, momentum=0.5)(x)))
        return x + nn.Dropout(0.3, deterministic=not train)(nn.Dense(WIDTH, name="down")(h))


def linen():
    block = LinenBlock()
    shapes = jax.eval_shape(lambda: block.init(KEY, X, train=False))
    params, stats = drawn(shapes["params"]), ones(shapes["batch_stats"])

    def fn(params, stats, key):
        variables = {"params": params, "batch_stats": stats}
        return block.apply(variables, X, train=True, mutable=["batch_stats"], rngs={"dropout": key})

    layouts = {f"attn/{name}/kernel": "ioo" for name in ("query", "key", "value")}
    layouts |= {"attn/out/kernel": "iio", "up/kernel": "io", "down/kernel": "io"}
    return fn, params, (stats, jax.random.key(5)), layouts


# --- Flax NNX: states of several kinds ------------------------------------------------------------


def nnx_kernel(key, shape, dtype, **_):
    return normal(len(shape), shape, dtype, 1 / (1 + len(shape)))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        kernels = {"kernel_init": nnx_kernel, "rngs": rngs}
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, **kernels)
        self.stats = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, HIDDEN, **kernels)
        self.down = nnx.Linear(HIDDEN, WIDTH, **kernels)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.dropout(self.down(nnx.gelu(self.up(self.stats(x)))))


def nnx_state(pure):
    graph, params, stats, rest = nnx.split(NnxBlock(nnx.Rngs(0)), nnx.Param, nnx.BatchStat, ...)

    def fn(params, stats, rest):
        model = nnx.merge(graph, params, stats, rest)
        model.train()
        y = model(X)
        _, _, stats, counts, _ = nnx.split(model, nnx.Param, nnx.BatchStat, nnx.RngCount, ...)
        return y, nnx.to_pure_dict(stats), nnx.to_pure_dict(counts)

    layouts = {f"attn/{name}/kernel": "ioo" for name in ("query", "key", "value")}
    layouts |= {"attn/out/kernel": "iio", "up/kernel": "io", "down/kernel": "io"}
    return fn, nnx.to_pure_dict(params) if pure else params, (stats, rest), layouts


# --- Haiku ----------------------------------------------------------------------------------------


def haiku_block(x):
    h = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
    init = hk.initializers.VarianceScaling(1.0)
    x = x + hk.MultiHeadAttention(HEADS, WIDTH // HEADS, w_init=init, name="attn")(h, h, h)
    return x, hk.nets.MLP([HIDDEN, WIDTH], activation=jax.nn.gelu, name="mlp")


HAIKU_LAYOUTS = {f"attn/{name}/w": "io" for name in ("query", "key", "value", "linear")} | {
    f"mlp/~/linear_{i}/w": "io" for i in (0, 1)
}


def haiku():
    def forward(x):
        x, mlp = haiku_block(x)
        return x + hk.dropout(hk.next_rng_key(), 0.3, mlp(x))

    model = hk.transform(forward)
    return (
        lambda params, key: model.apply(params, key, X),
        drawn(jax.eval_shape(model.init, KEY, X)),
        (KEY,),
        HAIKU_LAYOUTS,
    )


def haiku_with_state():
    def forward(x):
        x, mlp = haiku_block(x)
        return x + mlp(hk.BatchNorm(True, True, 0.5)(x, is_training=True))

    model = hk.transform_with_state(forward)
    params, state = jax.eval_shape(model.init, KEY, X)
    fn = lambda params, state: model.apply(params, state, None, X)
    return fn, drawn(params), (ones(state),), HAIKU_LAYOUTS


# --- Equinox: modules are the tree, weights are [out, in] -----------------------------------------


class EquinoxBlock(eqx.Module):
    norm: eqx.nn.LayerNorm
    attn: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    dropout: eqx.nn.Dropout

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.attn = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=first)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, HIDDEN, 1, activation=jax.nn.gelu, key=second)
        self.dropout = eqx.nn.Dropout(0.3)

    def __call__(self, x, key):
        h = jax.vmap(self.norm)(x)
        x = x + self.attn(h, h, h)
        return x + self.dropout(jax.vmap(self.mlp)(x), key=key)


def equinox():
    shapes = eqx.filter_eval_shape(EquinoxBlock, KEY)
    is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)
    params, static = eqx.partition(shapes, is_shape)
    params = drawn(params)

    def fn(params, keys):
        return jax.vmap(eqx.combine(params, static))(X, keys)

    names = ("query", "key", "value", "output")
    layouts = {f"attn/{name}_proj/weight": "oi" for name in names}
    layouts |= {f"mlp/layers/{i}/weight": "oi" for i in (0, 1)}
    return fn, params, (jax.random.split(KEY, len(X)),), layouts


# --- a bare function ------------------------------------------------------------------------------


def bare():
    shapes = [(WIDTH, HIDDEN), (HIDDEN, WIDTH)]
    weights = [normal(i, shape, jnp.float32) / 4 for i, shape in enumerate(shapes)]

    def fn(params):
        (up, down), bias = params
        x = X - X.mean(-1, keepdims=True)
        return X + jax.nn.gelu(x @ up) @ down + bias

    return fn, (weights, jnp.zeros((1, 1, WIDTH))), (), {"0/0": "io", "0/1": "io"}


MODELS = {
    "linen": linen,
    "nnx": lambda: nnx_state(pure=False),
    "nnx_pure_dict": lambda: nnx_state(pure=True),
    "haiku": haiku,
    "haiku_with_state": haiku_with_state,
    "equinox": equinox,
    "bare": bare,
}


def nodes(params):
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_node)
    return [node for _, node in flat if is_node(node)]


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    fn, params, args, layouts = MODELS[name]()
    adapted = lora_jax.init(KEY, params, lora_jax.LoraConfig(rank=2), fn, *args)
    lines = lora_jax.summary(adapted).splitlines()[1:-1]
    assert {line.split()[0]: line.split("]")[1].split()[0] for line in lines} == layouts

    run = jax.jit(lora_jax.lora(fn, on_dense="error"))
    jax.tree.map(np.testing.assert_array_equal, run(adapted, *args), jax.jit(fn)(params, *args))
    moved = randomize(adapted)
    got, want = run(moved, *args), jax.jit(fn)(merged(moved), *args)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-4, atol=2e-4), got, want)
    plain = lora_jax.merge(moved)
    assert jax.tree.structure(plain) == jax.tree.structure(params)


SLOW = ("nnx_pure_dict", "nnx", "equinox", "haiku_with_state", "bare")  # test_model has them too


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in MODELS]
)
def test_training(name, quick_compile):
    fn, params, args, layouts = MODELS[name]()
    adapted = lora_jax.init(KEY, params, lora_jax.LoraConfig(rank=2, alpha=4), fn, *args)
    apply = lora_jax.lora(fn, on_dense="error")
    tx = lora_jax.freeze(optax.adam(3e-2), adapted)

    def loss(adapted):
        return ((jax.tree.leaves(apply(adapted, *args))[0] - jnp.flip(X, -1)) ** 2).mean()

    @jax.jit
    def step(adapted, state):
        value, grads = jax.value_and_grad(loss)(adapted)
        updates, state = tx.update(grads, state, adapted)
        return optax.apply_updates(adapted, updates), state, value

    trained, state, values = adapted, tx.init(adapted), []
    for _ in range(30):
        trained, state, value = step(trained, state)
        values.append(float(value))
    assert values[-1] < 0.8 * values[0]
    base, _ = lora_jax.split(trained)
    jax.tree.map(np.testing.assert_array_equal, base, params)
    assert len(nodes(trained)) == len(layouts)
    for before, after in zip(nodes(adapted), nodes(trained), strict=True):
        assert not np.array_equal(before.a, after.a) and not np.array_equal(before.b, after.b)
