"""The embedding: torch.nn.Embedding's options against recorded runs of torch, then adapted."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax
from lora_jax import ConfigError, LoraWeight, StructureError
from lora_jax.layers import Embedding, embedding, looked_up, take_rows
from tests.programs import normal

pytestmark = pytest.mark.usefixtures("quick_compile")

RECORDED = load_file(
    pathlib.Path(__file__).parents[1] / "parity" / "torch" / "embedding.safetensors"
)
KEY = jax.random.key(0)
CASES = {
    "plain": {},
    "padding": {"padding_idx": 3},
    "padding_from_the_end": {"padding_idx": -1},
    "norm_2": {"max_norm": 1.5},
    "norm_1": {"max_norm": 1.5, "norm_type": 1.0},
    "norm_inf": {"max_norm": 0.8, "norm_type": float("inf")},
    "frequency": {"scale_grad_by_freq": True},
    "all": {"padding_idx": 3, "max_norm": 1.5, "norm_type": 3.0, "scale_grad_by_freq": True},
}


def recorded(case):
    return {
        k.split("/")[1]: jnp.asarray(x) for k, x in RECORDED.items() if k.startswith(case + "/")
    }


def counted_from_the_start(options):
    if "padding_idx" not in options:
        return options
    return options | {"padding_idx": embedding.padding_row(options["padding_idx"], 11)}


@pytest.fixture(params=list(CASES))
def case(request):
    return request.param


def loss(params, want, options, at=None):
    y = embedding.apply(params, want["ids"], at=at, **counted_from_the_start(options))
    return ((y - want["target"]) ** 2).mean(), y


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


# --- plain tables, as torch has them --------------------------------------------------------------


def test_output_and_gradient_are_torchs(case):
    want = recorded(case)
    grads, y = jax.jit(lambda p: jax.grad(loss, has_aux=True)(p, want, CASES[case]))(
        {"embedding": want["w"]}
    )
    close(y, want["y"])
    close(grads["embedding"], want["grad"])


def test_a_step_is_torchs(case):
    """With `renorm` before it, for torch writes bounded rows into the table that it reads."""
    want, options = recorded(case), CASES[case]
    params = {"embedding": want["w"]}
    if "max_norm" in options:
        norm_type = options.get("norm_type", 2.0)
        params = embedding.renorm(
            params, want["ids"], max_norm=options["max_norm"], norm_type=norm_type
        )
    close(params["embedding"], want["written"])
    grads, _ = jax.grad(loss, has_aux=True)(params, want, options)
    close(params["embedding"] - 0.5 * grads["embedding"], want["sgd"])


def test_rows_give_the_same(case):
    """Of the rows that are looked up alone: the same output, and the gradient's rows."""
    want = recorded(case)
    at = looked_up(want["ids"])
    rows = take_rows({"embedding": want["w"]}, at)
    grads, y = jax.grad(loss, has_aux=True)(rows, want, CASES[case], at)
    close(y, want["y"])
    distinct = len(np.unique(want["ids"]))
    assert grads["embedding"].shape == (want["ids"].size, 4)
    close(grads["embedding"][:distinct], want["grad"][at[:distinct]])
    np.testing.assert_array_equal(grads["embedding"][distinct:], 0)


def test_the_module_is_the_same(case):
    want = recorded(case)
    model = Embedding(11, 4, rank=0, **CASES[case])
    variables = {"params": {"embedding": want["w"]}}
    close(model.apply(variables, want["ids"]), want["y"])
    at = looked_up(want["ids"])
    close(model.apply(take_rows(variables, at), want["ids"], at=at), want["y"])


# --- adapted tables -------------------------------------------------------------------------------


def adapted():
    a, b = 0.5 * normal(1, (11, 3), jnp.float32), normal(2, (3, 4), jnp.float32)
    layout = lora_jax.Layout("io", uses=("gather",))
    return {"embedding": LoraWeight(recorded("all")["w"], a, b, jnp.float32(0.7), layout=layout)}


@pytest.mark.parametrize("case", ["plain", "norm_1", "frequency", "all"])
def test_an_adapted_table_is_its_merge(case):
    """Outputs are the same, and the gradients of A and B are the chain rule's from the table's."""
    want, params = recorded(case), adapted()
    merged = lora_jax.merge(params)
    grad = lambda p: jax.grad(loss, has_aux=True)(p, want, CASES[case])
    (dense, y), (grads, got) = jax.jit(lambda *trees: [grad(p) for p in trees])(merged, params)
    node, table = params["embedding"], dense["embedding"]
    close(got, y)
    close(grads["embedding"].a, 0.7 * table @ node.b.T)
    close(grads["embedding"].b, 0.7 * node.a.T @ table)
    np.testing.assert_array_equal(grads["embedding"].w, 0)


@pytest.mark.parametrize("case", ["plain", "all"])
def test_inside_a_transformed_function(case):
    """A network of plain and adapted layers may be given to `lora` as a whole."""
    want, params = recorded(case), adapted()
    model = Embedding(11, 4, rank=3, alpha=2.1, **CASES[case])
    outer = lora_jax.lora(model.apply, on_dense="error")
    both = jax.jit(lambda *args: (outer(*args), model.apply(*args)))
    got, own = both({"params": params}, want["ids"])
    close(got, own)


def test_one_id_and_many_at_once():
    """Any shape of ids, a scalar and none too, also vmapped."""
    params, options = adapted(), {"padding_idx": 0, "max_norm": 1.0, "scale_grad_by_freq": True}
    lookup = lambda ids: embedding.apply(params, ids, **options)
    ids = [jnp.arange(11), jnp.int32(5), jnp.array([[2, 2], [0, 9]]), jnp.zeros((0,), jnp.int32)]
    table, *found, many = jax.jit(lambda ids: [*map(lookup, ids), jax.vmap(lookup)(ids[2])])(ids)
    for got, at in zip([*found, many], [*ids[1:], ids[2]], strict=True):
        np.testing.assert_array_equal(got, np.asarray(table)[at])


def test_an_id_beyond_the_table_is_not_hidden():
    params = adapted()
    assert jnp.isnan(embedding.apply(params, jnp.array([11]))).all()
    rows, at = take_rows(params, jnp.array([2, 5])), jnp.array([2, 5])
    found = embedding.apply(rows, jnp.array([2, 3, 9]), at=at)
    assert jnp.isnan(found).all(-1).tolist() == [False, True, True]


def test_start_of_a_large_table():
    params = jax.jit(lambda k: embedding.init(k, 4000, 64, rank=4, alpha=8, padding_idx=-1))(KEY)
    node = params["embedding"]
    assert (node.a.shape, node.b.shape, float(node.scale)) == ((4000, 4), (4, 64), 2.0)
    np.testing.assert_allclose(node.w.std(), 1 / np.sqrt(4000), rtol=0.02)
    np.testing.assert_allclose(node.a.std(), 0.02, rtol=0.05)
    assert not node.b.any() and not node.w[-1].any() and not node.a[-1].any()


def test_what_is_refused():
    init = embedding.init
    for arguments in ((0, 4, 1), (11, 4, 5), (11, 4, -1), (11, 4, 1.5), (11, 4, True)):
        with pytest.raises(ConfigError, match=r"sizes|rank"):
            init(KEY, *arguments)
    with pytest.raises(ConfigError, match="not a row of a table of 11"):
        init(KEY, 11, 4, 1, padding_idx=11)
    params, ids = init(KEY, 11, 4, 0), jnp.array([1])
    with pytest.raises(ConfigError, match="from the start"):
        embedding.apply(params, ids, padding_idx=-1)
    for options in ({"max_norm": 0.0}, {"max_norm": 1.0, "norm_type": -1.0}):
        with pytest.raises(ConfigError, match="must be positive"):
            embedding.apply(params, ids, **options)
    with pytest.raises(StructureError, match="frozen"):
        embedding.renorm(adapted(), ids, max_norm=1.0)
    with pytest.raises(StructureError, match="init cannot use it"):
        Embedding(11, 4, 1).init(KEY, ids, at=ids)
