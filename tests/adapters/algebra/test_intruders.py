"""`intruders` and `reduce_intruders` on weights whose singular vectors are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import ConfigError, Layout, LoraWeight, StructureError, TargetError
from tests.adapters.algebra.random_overlays import matrices, overlay, update

pytestmark = pytest.mark.usefixtures("quick_compile")
VALUES = np.array([5.0, 4, 3, 2, 0.02, 0.01])
NEW = np.array([0, 0, 0, 0, 1, 1]) / np.sqrt(2)  # its cosine with two of the axes is 0.71


def diagonal(size, direction=NEW, a=None):
    """Return diag(VALUES) + size · a · directionᵀ as an adapted weight of scale 2."""
    a = direction if a is None else a
    factors = jnp.asarray(a[:, None], "float32"), jnp.asarray(direction[None] * size / 2, "float32")
    w = jnp.asarray(np.diag(VALUES), "float32")
    return {"w": LoraWeight(w, *factors, jnp.float32(2), layout=Layout("io"))}


def merged(params):
    return np.asarray(lora_jax.merge(params)["w"], np.float64)


def test_one_large_new_direction():
    """W + 40·n·nᵀ: its largest vector is nearly n, and the next are those of W."""
    params = diagonal(40.0)
    found = lora_jax.intruders(params, k=3, threshold=0.8)["w"]
    np.testing.assert_allclose(found.values, [40.015, 5, 4], rtol=1e-5)
    np.testing.assert_allclose(found.similarity, [np.sqrt(0.5), 1, 1], atol=2e-4)
    np.testing.assert_array_equal(found.new, [True, False, False])
    assert found.count == 1
    assert lora_jax.intruders(params, k=3, threshold=0.7)["w"].count == 0


def test_no_intruders_in_what_only_scales():
    axis = np.eye(6)[1]
    found = lora_jax.intruders(diagonal(40.0, axis), threshold=0.99)["w"]
    np.testing.assert_allclose(found.values, [44, 5, 3, 2, 0.02, 0.01], rtol=1e-4)
    np.testing.assert_allclose(found.similarity, 1, atol=1e-6)
    assert found.count == 0


def test_vectors_are_those_of_the_outputs():
    """A new input direction into known outputs makes no intruder; the converse makes one."""
    known = np.eye(6)[0]
    into_known = diagonal(400.0, direction=known, a=NEW)
    into_new = diagonal(400.0, direction=NEW, a=known)
    counts = [lora_jax.intruders(x, k=1, threshold=0.8)["w"].count for x in (into_known, into_new)]
    assert counts == [0, 1]


@pytest.mark.parametrize("factor", [0.3, 1.5])
def test_their_singular_values_are_scaled(factor):
    params = diagonal(40.0)
    u, s, vt = np.linalg.svd(merged(params))
    reduced = lora_jax.reduce_intruders(params, factor, k=3, threshold=0.8)
    assert reduced["w"].rank == 2 and reduced["w"].scale == 1
    s[0] *= factor
    np.testing.assert_allclose(merged(reduced), (u * s) @ vt, atol=1e-5)
    assert reduced["w"].w is params["w"].w


def test_a_given_rank_is_the_best_of_it():
    params = diagonal(40.0)
    exact = lora_jax.reduce_intruders(params, 0.3, k=3, threshold=0.8)
    got = lora_jax.reduce_intruders(params, 0.3, k=3, threshold=0.8, rank=1)
    u, s, vt = np.linalg.svd(merged(exact) - np.diag(VALUES))
    np.testing.assert_allclose(update(got["w"]), s[0] * np.outer(u[:, 0], vt[0]), atol=1e-4)


def test_every_layout_and_each_layer():
    """Layer by layer, against numpy in float64."""
    nodes = {path: node for path, node in overlay(0).items() if path == "experts"}
    rng = np.random.default_rng(1)
    params = {
        path: dataclasses.replace(node, w=jnp.asarray(rng.normal(size=node.shape), "float32"))
        for path, node in nodes.items()
    }
    found = lora_jax.intruders(params, k=3, threshold=0.8)
    reduced = lora_jax.reduce_intruders(params, 0.5, k=3, threshold=0.8)
    most = 0
    for path, node in params.items():
        w = np.asarray(node.w, np.float64)
        before, after = matrices(path, w), matrices(path, w + update(node))
        got = matrices(path, w + update(reduced[path]))
        batch = found[path].new.reshape(-1, 3)
        for one, known, tuned, new in zip(got, before, after, batch, strict=True):
            u, s, vt = np.linalg.svd(tuned, full_matrices=False)
            cosines = np.abs(vt @ np.linalg.svd(known, full_matrices=False)[2].T).max(1)
            want = cosines[:3] < 0.8
            np.testing.assert_array_equal(new, want)
            s[:3][want] *= 0.5
            np.testing.assert_allclose(one, (u * s) @ vt, atol=2e-5)
        count = int(batch.sum(1).max())
        most = max(most, count)
        assert reduced[path].rank == node.rank + count
        assert found[path].values.shape == (*node.scale.shape, 3)
    assert most > 0


@pytest.mark.slow
def test_layers_that_are_off_have_none():
    node = overlay(0)["stacked"]
    w = jnp.asarray(np.random.default_rng(1).normal(size=node.shape), "float32")
    node = dataclasses.replace(node, w=w, scale=jnp.array([0.0, 1.0, 0.0]))
    assert not lora_jax.intruders({"w": node}, threshold=0.9)["w"].new[jnp.array([0, 2])].any()
    reduced = lora_jax.reduce_intruders({"w": node}, 0.5, threshold=0.9)
    np.testing.assert_array_equal(reduced["w"].scale, [0, 1, 0])


def test_targets_and_errors():
    params = diagonal(40.0) | {"other": diagonal(40.0)["w"]}
    assert [*lora_jax.intruders(params, targets=["w"])] == ["w"]
    reduced = lora_jax.reduce_intruders(params, 0, threshold=0.8, targets=["w"])
    assert reduced["other"] is params["other"]
    with pytest.raises(TargetError, match="'v' matches no path"):
        lora_jax.intruders(params, targets=["v"])
    with pytest.raises(ConfigError, match="intruders: k must be a positive integer, got 0"):
        lora_jax.intruders(params, k=0)
    with pytest.raises(ConfigError, match="intruders: threshold must be from 0 to 1, got 2"):
        lora_jax.intruders(params, threshold=2)
    with pytest.raises(ConfigError, match="factor must be a finite number, got nan"):
        lora_jax.reduce_intruders(params, float("nan"))
    with pytest.raises(StructureError, match="other: these are adapters without their base"):
        lora_jax.intruders(lora_jax.split(params)[1])
    dora = {"w": dataclasses.replace(params["w"], magnitude=jnp.ones(6))}
    with pytest.raises(StructureError, match=r'w: DoRA, .* combine\(.*method="svd"'):
        lora_jax.reduce_intruders(dora)
    assert lora_jax.intruders(dora, k=2)["w"].values.shape == (2,)
    with pytest.raises(ConfigError, match=r"w: ranks depend on the values.* call it outside jit"):
        jax.jit(lora_jax.reduce_intruders)(diagonal(40.0))
    assert jax.jit(lora_jax.intruders)(diagonal(40.0))["w"].count == 0
