"""`extract`: the best adapter of a fine-tune, against numpy's SVD."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import ConfigError, LoraConfig, Override, StructureError, TargetError, TrainedLeaf
from tests.programs.weights_of_each_kind import INPUTS, PARAMS, RANK, ROWS, normal, program, tail

pytestmark = pytest.mark.usefixtures("quick_compile")
TARGETS = list(PARAMS)
TUNED = {
    path: (w + 0.1 * normal(9, *w.shape).astype(w.dtype)).astype(w.dtype)
    for path, w in PARAMS.items()
}


def change(row):
    before, after = (np.asarray(tree[row.name], np.float32) for tree in (PARAMS, TUNED))
    return row.matrices(after - before)


@pytest.fixture(scope="module", params=[True, False], ids=["exact", "randomised"])
def extracted(request):
    config = LoraConfig(rank=RANK, alpha=3 * RANK, targets=TARGETS)

    @jax.jit  # one compilation for all
    def run(base, tuned):
        return lora_jax.extract(base, tuned, config, program, INPUTS, exact=request.param)

    return *run(PARAMS, TUNED), request.param


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_best_of_its_rank_on_every_kind_of_weight(row, extracted):
    """Eckart and Young: the residual is the singular tail, each layer of a stack on its own."""
    overlay, residuals, exact = extracted
    node, want = overlay[row.name], change(row)
    assert node.layout.axes == row.axes and node.rank == RANK and node.w is None
    np.testing.assert_array_equal(node.scale, np.full(node.scale.shape, 3.0))
    a, b = (np.asarray(x) for x in (node.a, node.b))
    got = 3 * a.reshape(len(want), -1, RANK) @ b.reshape(len(want), RANK, -1)
    best, size = tail(want, RANK), np.linalg.norm(want)
    np.testing.assert_allclose(np.linalg.norm(want - got) / size, residuals[row.name], rtol=1e-4)
    np.testing.assert_allclose(residuals[row.name], best / size, rtol=1e-4 if exact else 0.02)
    assert residuals[row.name] >= best / size - 1e-5


def test_the_whole_change_where_the_rank_suffices():
    params = {"w": PARAMS["linear"]}
    config = LoraConfig(rank=3, alpha=6)
    adapted = lora_jax.init(jax.random.key(0), params, config)
    trained = jax.tree.map(lambda x: x + 0.1, lora_jax.split(adapted)[1])
    tuned = lora_jax.merge(lora_jax.join(params, trained))
    overlay, residuals = lora_jax.extract(params, tuned, 4)
    assert residuals["w"] < 1e-5
    np.testing.assert_allclose(
        lora_jax.merge(lora_jax.join(params, overlay))["w"], tuned["w"], atol=1e-5
    )


def test_a_matrix_of_rank_one_is_a_column_times_a_row():
    """The notes' example: nine numbers are six, [2, 3, 4]ᵀ times [1, 2, 3]."""
    w = {"w": jnp.array([[2.0, 4, 6], [3, 6, 9], [4, 8, 12]])}
    overlay, residuals = lora_jax.extract(jax.tree.map(jnp.zeros_like, w), w, 1, exact=True)
    a, b = np.asarray(overlay["w"].a), np.asarray(overlay["w"].b)
    np.testing.assert_allclose(a / a[0] * 2, [[2], [3], [4]], atol=1e-5)
    np.testing.assert_allclose(b / b[0, 0], [[1, 2, 3]], atol=1e-5)
    np.testing.assert_allclose(a @ b, w["w"], atol=1e-5)
    assert residuals["w"] < 1e-6


def test_truncating_the_singular_values_by_hand():
    """Singular values 3, 2, 1: rank one leaves √(2² + 1²) of √14, rank two 1 of √14."""
    change = {"w": jnp.diag(jnp.array([1.0, 3.0, 2.0]))}
    zero = jax.tree.map(jnp.zeros_like, change)
    for rank, left in ((1, 5 / 14), (2, 1 / 14), (3, 0)):
        _, residuals = lora_jax.extract(zero, change, rank, exact=True)
        np.testing.assert_allclose(residuals["w"], left**0.5, atol=1e-6)


def test_what_is_trained_whole_and_what_is_missed():
    base = {
        "dense": {"kernel": PARAMS["linear"], "bias": jnp.zeros(16)},
        "norm": {"scale": jnp.ones(16), "bias": jnp.zeros(16)},
        "same": jnp.ones(3),
        "count": jnp.array(3),
    }
    tuned = jax.tree.map(lambda x: x + 1, {**base, "same": base["same"] - 1})
    config = LoraConfig(rank=2, train=["dense/bias", "norm/scale"])
    overlay, residuals = lora_jax.extract(base, tuned, config)
    assert isinstance(overlay["dense"]["bias"], TrainedLeaf) and overlay["norm"]["bias"] is None
    merged = lora_jax.merge(lora_jax.join(base, overlay))
    for path in (("dense", "kernel"), ("dense", "bias"), ("norm", "scale"), ("same",)):
        got, want = merged, tuned
        for name in path:
            got, want = got[name], want[name]
        np.testing.assert_allclose(got, want, atol=1e-4)
    assert residuals["dense/kernel"] < 1e-5  # 1 everywhere is of rank 1
    left = {path: x for path, x in residuals.items() if path != "dense/kernel"}
    assert left == {
        "dense/bias": 0,
        "norm/scale": 0,
        "norm/bias": 1,
        "same": 0,
        "count": 1,
    }


def test_a_leaf_trained_whole_in_a_coarse_dtype_says_what_it_loses():
    base, tuned = {"w": jnp.ones((4, 3))}, {"w": jnp.full((4, 3), 1 + 2**-9)}
    config = LoraConfig(rank=1, targets=(), train=["w"], dtype=jnp.bfloat16)
    assert lora_jax.extract(base, tuned, config)[1] == {"w": 1.0}  # bfloat16 rounds it to 1


def test_ranks_by_pattern_and_targets():
    config = LoraConfig(rank=2, targets=["linear", "conv"], overrides={"conv": Override(rank=5)})
    overlay, residuals = lora_jax.extract(PARAMS, TUNED, config, program, INPUTS)
    assert overlay["linear"].rank == 2 and overlay["conv"].rank == 5
    assert overlay["stacked"] is None and residuals["stacked"] == 1


def test_what_did_not_change_stays():
    overlay, residuals = lora_jax.extract({"w": PARAMS["linear"]}, {"w": PARAMS["linear"]}, 2)
    assert residuals["w"] == 0 and np.isfinite(overlay["w"].a).all()
    same = lora_jax.merge(lora_jax.join({"w": PARAMS["linear"]}, overlay))
    np.testing.assert_array_equal(same["w"], PARAMS["linear"])


def test_shapes_alone_and_under_jit():
    base, tuned = (
        {"w": PARAMS["linear"], "b": jnp.ones(3)},
        {"w": TUNED["linear"], "b": jnp.ones(3)},
    )
    real, residuals = lora_jax.extract(base, tuned, 2)
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), base)
    for found in (
        lora_jax.extract(structs, structs, 2),
        jax.eval_shape(lambda b, t: lora_jax.extract(b, t, 2), base, tuned),
    ):
        assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(found))
        assert jax.tree.map(jnp.shape, found[0]) == jax.tree.map(jnp.shape, real)
        assert found[1].keys() == residuals.keys()
    jitted, missed = jax.jit(lambda b, t: lora_jax.extract(b, t, 2))(base, tuned)
    np.testing.assert_allclose(jitted["w"].a @ jitted["w"].b, real["w"].a @ real["w"].b, atol=1e-5)
    np.testing.assert_allclose(missed["w"], residuals["w"], rtol=1e-5)


# --- refusals -------------------------------------------------------------------------------------


def test_trees_that_differ_are_all_listed():
    base = {"a": jnp.ones((4, 3)), "b": jnp.ones((4, 3)), "c": jnp.ones((4, 3)), "d": jnp.ones(2)}
    tuned = {
        "a": jnp.ones((4, 5)),
        "b": lora_jax.init(jax.random.key(0), {"b": base["b"]}, LoraConfig(rank=1))["b"],
        "d": jnp.ones(2),
        "e": jnp.ones(2),
    }
    with pytest.raises(StructureError) as caught:
        lora_jax.extract(base, tuned, 1)
    message = str(caught.value)
    assert "a: (4, 3) in base, (4, 5) in tuned" in message
    assert "b: adapted in tuned; call merge(tuned)" in message
    assert "c: only in base" in message and "e: only in tuned" in message and "d:" not in message


def test_what_init_refuses_is_refused():
    w = {"w": jnp.ones((4, 3))}
    with pytest.raises(TargetError, match="rank 9 is above"):
        lora_jax.extract(w, w, 9)
    with pytest.raises(ConfigError, match="rank must be"):
        lora_jax.extract(w, w, 0)
    with pytest.raises(ConfigError, match="extract: config must be a LoraConfig"):
        lora_jax.extract(w, w, {"rank": 2})
    with pytest.raises(ConfigError, match="w: the scale is 0"):
        lora_jax.extract(w, w, LoraConfig(rank=1, alpha=0))
