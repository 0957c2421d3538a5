"""A function that `lora` did not transform gets the library's own error, and no arrays."""

import copy
import pickle

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import lora_jax
from lora_jax import LoraConfig, StructureError

KEY = jax.random.key(0)
X = jnp.ones((2, 6))
NODE = lora_jax.init(KEY, {"kernel": jnp.ones((6, 4))}, LoraConfig(rank=2))["kernel"]
LEAF = lora_jax.TrainedLeaf(jnp.zeros(4), jnp.ones(4), jnp.float32(1))
ROWS = lora_jax.TrainedRows(
    jnp.ones((6, 4)),
    jnp.ones((1, 4)),
    jnp.float32(1),
    rows=(2,),
    axis=0,
    layout=lora_jax.Layout("io"),
)

USES = {
    "matmul": lambda w: X @ w,
    "left": lambda w: w @ X,
    "numpy": lambda w: np.ones((2, 6)) @ w,
    "sum": lambda w: w + 1,
    "times": lambda w: 2.0 * w,
    "index": lambda w: w[0],
    "dot": lambda w: jnp.dot(X, w),
    "einsum": lambda w: jnp.einsum("bi,io->bo", X, w),
    "take": lambda w: jnp.take(w, 0, 0),
    "asarray": jnp.asarray,
    "numpy_asarray": np.asarray,
    "jit": jax.jit(lambda w: X @ w),
    "grad": jax.grad(lambda w: (X @ w).sum()),
    "vmap": jax.vmap(lambda w, x: x @ w, in_axes=(None, 0)),
}


def check(error):
    assert "lora_jax.lora(fn)" in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("node", [NODE, LEAF, ROWS], ids=lambda node: type(node).__name__)
@pytest.mark.parametrize("name", USES)
def test_uses(name, node):
    use = USES[name] if name != "vmap" else lambda w: USES["vmap"](w, X)
    with pytest.raises(StructureError) as error:
        use(node)
    check(error)


def test_a_primitive_shows_no_arrays_either():
    with pytest.raises(ValueError) as error:  # this one is JAX's
        lax.dot_general(X, NODE, (((1,), (0,)), ((), ())))
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["T", "astype", "reshape", "ndim", "at", "sum"])
def test_attributes(name):
    assert not hasattr(NODE, name)
    with pytest.raises(AttributeError) as error:
        getattr(NODE, name)
    check(error)
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        NODE.other  # noqa: B018


def linen():
    model = nn.Dense(4)
    return lambda params: model.apply(params, X), model.init(KEY, X)


def haiku():
    model = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(4)(x)))
    return lambda params: model.apply(params, X), model.init(KEY, X)


MODELS = {
    "linen": linen,
    "haiku": haiku,
    "equinox": lambda: (lambda m: jax.vmap(m)(X), eqx.nn.Linear(6, 4, key=KEY)),
    "nnx": lambda: (lambda m: m(X), nnx.Linear(6, 4, rngs=nnx.Rngs(0))),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    fn, params = MODELS[name]()
    adapted = lora_jax.init(KEY, params, LoraConfig(rank=2), fn)
    with pytest.raises(StructureError) as error:
        fn(adapted)
    check(error)
    np.testing.assert_allclose(lora_jax.lora(fn)(adapted), fn(params), rtol=1e-6)


def test_what_any_object_can_do_stays():
    assert NODE and copy.deepcopy(NODE).rank == 2 and pickle.loads(pickle.dumps(NODE)).rank == 2
    with pytest.raises(StructureError) as error:
        list(NODE)
    check(error)
