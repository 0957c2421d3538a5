"""`compress` and `resize`: against numpy's SVD in float64, on every kind of weight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import ConfigError, Layout, LoraWeight, StructureError
from tests.adapters.algebra.random_overlays import KINDS, close, matrices, overlay, update
from tests.programs.jaxprs import weight_sized

pytestmark = pytest.mark.usefixtures("quick_compile")
ADAPTERS = overlay(0, rank=4)


def spectrum(path, node):
    return np.linalg.svd(matrices(path, update(node)), compute_uv=False)


def test_smaller_ranks_are_the_best_and_say_what_they_keep():
    got, kept = jax.jit(lambda x: lora_jax.compress(x, 2))(ADAPTERS)
    for path, node in ADAPTERS.items():
        s = spectrum(path, node)
        lost = matrices(path, update(node) - update(got[path]))
        tail = np.sqrt((s[:, 2:] ** 2).sum(-1))
        np.testing.assert_allclose(np.linalg.norm(lost, axis=(1, 2)), tail, rtol=1e-4, err_msg=path)
        share = (s[:, :2] ** 2).sum() / (s**2).sum()
        np.testing.assert_allclose(kept[path], share, rtol=1e-5)
        np.testing.assert_array_equal(got[path].scale, node.scale)
        grams = np.einsum("bir,bis->brs", *[np.asarray(got[path].a).reshape(len(s), -1, 2)] * 2)
        np.testing.assert_allclose(grams[:, 0, 1], 0, atol=1e-4)  # balanced singular vectors


def test_the_rank_that_it_has_is_exact():
    """A rank of 4 whose factors are twice as wide."""
    some = {path: ADAPTERS[path] for path in ("conv", "experts")}
    wide = lora_jax.combine([some, some])
    got, kept = lora_jax.compress(wide, 4)
    close(got, {path: 2 * update(node) for path, node in some.items()}, rtol=4e-6)
    same, shares = lora_jax.compress(ADAPTERS, 4)
    assert all(same[path] is node for path, node in ADAPTERS.items())
    assert {*shares.values()} == {1.0} and min(kept.values()) > 1 - 1e-6


def test_energy_takes_the_smallest_rank():
    some = {"stacked": ADAPTERS["stacked"]}
    for energy in (0.5, 0.9, 1.0):
        got, kept = lora_jax.compress(some, energy=energy)
        for path, node in got.items():
            shares = np.cumsum(spectrum(path, ADAPTERS[path]) ** 2, -1)
            shares /= shares[:, -1:]
            assert node.rank == max(np.argmax(shares > energy - 1e-9, -1)) + 1
            assert kept[path] >= energy - 1e-6
    both, _ = lora_jax.compress(some, 2, energy=1.0)
    assert both["stacked"].rank == 2


def test_energy_of_all_finds_the_true_rank():
    node = ADAPTERS["linear"]
    twice = lora_jax.combine([{"w": node}] * 3)
    got, _ = lora_jax.compress(twice, energy=1.0)
    assert twice["w"].rank == 12 and got["w"].rank == 4


@pytest.mark.slow
def test_small_values_are_no_rounding_errors():
    long = np.random.default_rng(0).normal(size=(20_000, 2)) * [1, 1e-3]  # small, and no noise
    b = jnp.asarray(np.eye(2, 5), jnp.float32)
    both = LoraWeight(None, jnp.asarray(long, jnp.float32), b, jnp.float32(1), layout=Layout("io"))
    assert lora_jax.compress({"w": both}, energy=1.0)[0]["w"].rank == 2


def test_an_update_of_zeros_keeps_one_rank():
    node = ADAPTERS["linear"]
    zero = {"w": dataclasses.replace(node, b=jnp.zeros_like(node.b))}
    got, kept = lora_jax.compress(zero, energy=0.9)
    assert got["w"].rank == 1 and kept["w"] == 1


def test_layers_that_are_off_do_not_count():
    node = ADAPTERS["stacked"]
    first = jnp.zeros_like(node.a).at[0, :, 0].set(node.a[0, :, 0])
    node = dataclasses.replace(node, a=node.a.at[0].set(first[0]), scale=jnp.array([1.0, 0.0, 0.0]))
    got, kept = lora_jax.compress({"w": node}, energy=0.999)
    assert got["w"].rank == 1 and kept["w"] > 0.999


def test_products_are_never_formed():
    """Where A is 100 × 3 and B 3 × 90, nothing has both long sides."""
    a, b = jnp.zeros((100, 3)), jnp.zeros((3, 90))
    node = LoraWeight(None, a, b, jnp.float32(1), layout=Layout("io"))
    for verb in (lora_jax.combine, lambda x: lora_jax.compress(x[0], 2), jax_svd):
        program = jax.make_jaxpr(lambda node, verb=verb: verb([{"w": node}] * 2))(node)
        assert not weight_sized(program.jaxpr, [(100, 90)])


def jax_svd(adapters):
    return lora_jax.combine(adapters, method="svd")


@pytest.mark.parametrize("key", [None, 1])
def test_a_larger_rank_changes_nothing(key):
    key = None if key is None else jax.random.key(key)
    some = {"experts": ADAPTERS["experts"]}
    got = lora_jax.resize(some, 7, key=key)
    for path, node in got.items():
        assert node.rank == 7
        np.testing.assert_array_equal(node.a[..., :4], some[path].a)
        np.testing.assert_allclose(update(node), update(some[path]), rtol=1e-12)
        new = np.asarray(node.a[..., 4:])
        bound = 1 / np.sqrt(node.layout.fan_in(node.shape))
        assert not new.any() if key is None else bound / 2 < np.abs(new).max() <= bound


def test_resize_gives_all_weights_one_rank():
    got = lora_jax.resize(overlay(0, rank=4, kinds=("linear",)) | {"conv": overlay(1)["conv"]}, 3)
    assert (got["linear"].rank, got["conv"].rank) == (3, 3)
    close({"conv": got["conv"]}, {"conv": update(overlay(1)["conv"])}, rtol=1e-7)


def test_joined_trees_magnitudes_and_trained_leaves_stay():
    node = ADAPTERS["linear"]
    w, magnitude = jnp.ones(node.shape), jnp.ones(5)
    params = {
        "w": dataclasses.replace(node, w=w, magnitude=magnitude),
        "b": lora_jax.TrainedLeaf(jnp.zeros(3), jnp.ones(3), jnp.float32(1)),
        "rest": jnp.zeros(2),
    }
    got, kept = lora_jax.compress(params, 1)
    assert got["w"].w is w and got["w"].magnitude is magnitude and got["w"].rank == 1
    assert got["b"] is params["b"] and got["rest"] is params["rest"] and [*kept] == ["w"]


def test_dtypes_stay():
    node = overlay(0, rank=4, dtype=jnp.bfloat16, kinds=("linear",))
    got, _ = lora_jax.compress(node, 2)
    assert got["linear"].a.dtype == got["linear"].b.dtype == jnp.bfloat16


@pytest.mark.slow
def test_shapes_alone():
    shapes = jax.eval_shape(lambda: ADAPTERS)
    want = jax.eval_shape(lambda: lora_jax.compress(ADAPTERS, 2)[0])
    got, _ = lora_jax.compress(shapes, 2)
    assert got == want


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lora_jax.compress(ADAPTERS), "give rank=, the largest rank, or energy="),
        (
            lambda: lora_jax.compress(ADAPTERS, 0),
            "compress: rank must be a positive .*, got 0",
        ),
        (lambda: lora_jax.compress(ADAPTERS, energy=1.2), "above 0 and at most 1, got 1.2"),
        (lambda: lora_jax.compress(ADAPTERS, energy=0), "above 0 and at most 1, got 0"),
        (
            lambda: lora_jax.resize(ADAPTERS, 2.5),
            "resize: rank must be a positive .*, got 2.5",
        ),
        (
            lambda: jax.jit(lambda x: lora_jax.compress(x, energy=0.5)[0])(ADAPTERS),
            "compress: attention: energy= chooses ranks by the values.*outside jit",
        ),
    ],
)
def test_options_that_are_wrong(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_no_adapters():
    with pytest.raises(StructureError, match="compress: the tree contains no adapters"):
        lora_jax.compress({"w": jnp.ones(3)}, 1)


def test_kinds_are_all_there():
    assert isinstance(ADAPTERS["conv"], LoraWeight) and ADAPTERS.keys() == KINDS.keys()
    assert ADAPTERS["conv"].layout == Layout("iiio")
