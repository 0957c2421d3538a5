"""`combine`: sums of adapters against dense sums in float64, on every kind of weight."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import ConfigError, StructureError
from lora_jax.adapters.algebra.methods import METHODS, Recipe, keep_largest, sum_values
from tests.adapters.algebra.random_overlays import (
    close,
    matrices,
    overlay,
    random_node,
    total,
    update,
)
from tests.programs.weights_of_each_kind import INPUTS, ROWS, normal, program

pytestmark = pytest.mark.usefixtures("quick_compile")
ADAPTERS = [overlay(0), overlay(1), overlay(2, kinds=("linear", "stacked", "conv"))]
WEIGHTS = [0.5, -2.0, 1.5]


@functools.cache
def compiled(**options):
    """`combine` with these options as one program."""
    return jax.jit(functools.partial(lora_jax.combine, **options))


def combined(adapters, weights, **options):
    return compiled(**options)(adapters, jnp.asarray(weights))


def test_cat_is_the_sum_with_any_ranks_and_dtypes():
    small = overlay(3, rank=1, kinds=("linear", "attention", "experts"))
    coarse = overlay(4, rank=3, dtype=jnp.bfloat16)
    got = combined([ADAPTERS[0], small, coarse], WEIGHTS)
    close(got, total([ADAPTERS[0], small, coarse], WEIGHTS))
    assert got["linear"].rank == 6 and got["conv"].rank == 5
    assert got["linear"].a.dtype == got["linear"].b.dtype == jnp.float32
    for node in got.values():
        np.testing.assert_array_equal(node.scale, 1)


def test_svd_is_the_best_of_its_rank():
    """Eckart and Young, against numpy in float64; whichever adapter comes first."""
    order = (2, 0, 1)
    got = combined([ADAPTERS[i] for i in order], [WEIGHTS[i] for i in order], method="svd", rank=3)
    for path, want in total(ADAPTERS, WEIGHTS).items():
        u, s, vt = np.linalg.svd(matrices(path, want), full_matrices=False)
        best = (u[..., :3] * s[:, None, :3]) @ vt[:, :3]
        np.testing.assert_allclose(matrices(path, update(got[path])), best, atol=1e-4, err_msg=path)
        assert got[path].rank == 3


def test_svd_of_the_full_rank_is_cat_and_larger_ranks_are_zeros():
    adapters = [{"conv": nodes["conv"]} for nodes in ADAPTERS]
    got = combined(adapters, WEIGHTS, method="svd", rank=8)
    close(got, {"conv": total(ADAPTERS, WEIGHTS)["conv"]}, rtol=5e-6)
    assert got["conv"].rank == 8 and not np.asarray(got["conv"].a)[..., 4:].any()


@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_counted_once_is_itself(method):
    options = {} if METHODS[method].keeps == "all" else {"density": 1}
    keys = {"key": jax.random.key(0)} if METHODS[method].keeps == "random" else {}
    one = {"stacked": ADAPTERS[0]["stacked"]}
    got = lora_jax.combine([one], method=method, **options, **keys)
    close(got, {"stacked": update(one["stacked"])}, rtol=3e-6)


def test_ties_does_not_depend_on_the_order():
    options = {"method": "ties", "density": 0.6, "majority_sign": "frequency"}
    adapters = [{path: nodes[path] for path in ("stacked",)} for nodes in ADAPTERS]
    some = combined(adapters, WEIGHTS, **options)
    others = combined([adapters[i] for i in (2, 0, 1)], [WEIGHTS[i] for i in (2, 0, 1)], **options)
    for path in some:
        np.testing.assert_allclose(some[path].a, others[path].a, atol=1e-6)
        np.testing.assert_allclose(some[path].b, others[path].b, atol=1e-6)


def test_linear_puts_the_sign_on_a_alone():
    node = ADAPTERS[0]["linear"]
    got = lora_jax.combine([{"w": node}], [-4], method="linear")["w"]
    root = 2 * np.sqrt(node.scale)
    np.testing.assert_allclose(got.a, -root * node.a, rtol=1e-6)
    np.testing.assert_allclose(got.b, root * node.b, rtol=1e-6)


def test_adapters_subtract_from_themselves():
    got = combined([ADAPTERS[0], ADAPTERS[0]], [1, -1])
    assert all(np.abs(update(node)).max() < 1e-12 for node in got.values())


def test_ties_by_hand():
    """Elected signs +, -, + (even), and nothing left of the fourth; weights count afterwards."""
    values = jnp.array([[[4.0, -3.0, 1.0, 0.5]], [[-1.0, -1.0, -1.0, 0.1]]])
    masks = jnp.array([[[True, True, True, False]], [[True, True, True, False]]])
    recipe = Recipe(METHODS["ties"], 0.75)
    sums = jax.jit(sum_values, static_argnums=3)
    got = sums(values, jnp.array([2.0, 10.0]), masks, recipe)
    np.testing.assert_allclose(got, [[8, (-6 - 10) / 2, 2, 0]])
    values = values.at[1, 0, 0].set(-9)
    assert sums(values, jnp.array([2.0, 10.0]), masks, recipe)[0, 0] == -90
    recipe = Recipe(METHODS["ties"], 0.75, "frequency")
    assert sums(values, jnp.array([2.0, 10.0]), masks, recipe)[0, 0] == 8


def test_the_density_counts_elements_also_of_equal_ones():
    """⌊density · n⌋, as PEFT does: 0.29 and 0.3 of 12 are 3."""
    keep = jax.jit(keep_largest, static_argnames="density")
    for values in (np.ones((2, 3, 4), "f4"), np.arange(24, dtype="f4").reshape(2, 3, 4) - 11):
        for density, count in [(0, 0), (0.29, 3), (0.3, 3), (1, 12)]:
            kept, size = np.asarray(keep(values, density=density)), np.abs(values)
            np.testing.assert_array_equal(kept.sum((1, 2)), count)
            for mask, x in zip(kept, size, strict=True):
                assert x[mask].min(initial=99) >= x[~mask].max(initial=0)


def test_layers_that_no_adapter_has_stay_off():
    masked = [lora_jax.set_scale(ADAPTERS[i], 1.0)["stacked"] for i in (0, 1)]
    scales = [jnp.array([0.0, 1, 0]), jnp.array([0.0, 2, 1])]
    nodes = [
        {"w": lora_jax.LoraWeight(None, x.a, x.b, s, layout=x.layout)}
        for x, s in zip(masked, scales, strict=True)
    ]
    for method in ("cat", "svd", "linear"):
        got = lora_jax.combine(nodes, method=method)["w"]
        np.testing.assert_array_equal(got.scale, [0, 1, 1])
        assert not update(got)[0].any()


def test_weights_may_be_traced_and_have_gradients():
    """As where weights are searched for: one compilation, and the gradient of the exact sum."""
    nodes = [{"w": ADAPTERS[i]["linear"]} for i in (0, 1)]
    traces = []

    @jax.jit
    @jax.grad
    def gradient(weights):
        traces.append(None)
        node = lora_jax.combine(nodes, weights)["w"]
        return (node.scale * node.a @ node.b)[1, 2]

    for weights in ([1.0, 2.0], [-3.0, 0.5]):
        got = gradient(jnp.array(weights))
        np.testing.assert_allclose(got, [update(n["w"])[1, 2] for n in nodes], rtol=1e-5)
    assert len(traces) == 1


def test_a_program_of_combined_adapters_computes_the_sum():
    """Every kind of weight, against the program of W + Σ w·ΔW, computed in float64."""
    weights = [1.0, -0.5]
    base = {row.name: np.asarray(row.w, np.float32) for row in ROWS}
    rng = np.random.default_rng(0)
    adapters = [{x.name: random_node(rng, x.axes, x.shape, 2, 0.1) for x in ROWS} for _ in weights]
    exact = lora_jax.combine(adapters, weights)
    best = lora_jax.combine(adapters, weights, method="svd", rank=4)
    run = jax.jit(lambda overlay: lora_jax.lora(program)(lora_jax.join(base, overlay), INPUTS))
    summed = {
        path: (w + sum(x * update(n[path]) for n, x in zip(adapters, weights, strict=True)))
        for path, w in base.items()
    }
    want = jax.jit(program)(jax.tree.map(lambda x: x.astype("f4"), summed), INPUTS)
    for got in map(run, (exact, best)):
        for path in base:
            np.testing.assert_allclose(got[path], want[path], atol=2e-5, err_msg=path)


def test_shapes_alone_and_an_empty_plan():
    shapes = jax.eval_shape(lambda: ADAPTERS[:2])
    want = jax.eval_shape(lambda: lora_jax.combine(ADAPTERS[:2], method="svd"))
    assert lora_jax.combine(shapes, method="svd") == want


def with_dora(seed):
    """Return an overlay of two weights with magnitudes, and the base that they belong to."""
    base = {"linear": normal(1, 6, 5), "stacked": normal(2, 3, 6, 5)}
    nodes = overlay(seed, kinds=tuple(base))
    magnitudes = {"linear": (5,), "stacked": (3, 5)}
    return base, {
        path: dataclasses.replace(nodes[path], magnitude=3 + normal(seed, *shape))
        for path, shape in magnitudes.items()
    }


def dora_update(node, w):
    """Return what DoRA changes, in float64."""
    w = np.asarray(w, np.float64)
    total = w + update(node)
    norms = np.sqrt((total**2).sum(-2, keepdims=True))
    return np.asarray(node.magnitude, np.float64)[..., None, :] * total / norms - w


def test_dora_by_its_dense_meaning():
    (base, some), (_, others), weights = with_dora(4), with_dora(5), [0.75, -0.5]
    got = lora_jax.combine([some, others], weights, method="svd", rank=6, base=base)
    for path, w in base.items():
        parts = zip((some, others), weights, strict=True)
        want = sum(weight * dora_update(nodes[path], w) for nodes, weight in parts)
        np.testing.assert_allclose(update(got[path]), want, atol=3e-5)
        assert got[path].magnitude is None


def test_dora_without_its_base():
    base, nodes = with_dora(4)
    plain = {"linear": None, "stacked": overlay(6)["stacked"]}
    with pytest.raises(StructureError, match="stacked: DoRA, whose change is not scale·A·B"):
        lora_jax.combine([nodes, plain])
    with pytest.raises(StructureError, match="linear: DoRA changes the weight by its values"):
        lora_jax.combine([nodes, plain], method="svd")
    joined = lora_jax.join(base, nodes)
    assert lora_jax.combine([joined, plain], method="svd", rank=1)["stacked"].rank == 1
    kept = lora_jax.combine([nodes])["linear"]  # alone, and once: it needs no base
    np.testing.assert_array_equal(kept.magnitude, nodes["linear"].magnitude)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sum"}, "method must be one of cat, linear, svd, ties, .*got 'sum'"),
        ({"method": "ties"}, "'ties' needs density=, the share .* from 0 to 1, got None"),
        ({"method": "ties", "density": 1.5}, "from 0 to 1, got 1.5"),
        ({"method": "cat", "density": 0.5}, "'cat' keeps all elements; leave density out"),
        ({"method": "dare_linear", "density": 0.0}, "divides by the density: it must not be 0"),
        (
            {"method": "dare_linear", "density": 0.5},
            "draws at random; pass key=jax.random",
        ),
        (
            {"method": "linear", "rank": 3},
            "'linear' has no rank to choose; take .svd.",
        ),
        ({"method": "svd", "rank": 0}, "rank must be a positive integer, got 0"),
        ({"majority_sign": "most"}, "majority_sign must be one of total, frequency, got 'most'"),
        ({"weights": [1.0]}, r"one number per adapter, 2, got the shape \(1,\)"),
        ({"weights": [1.0, np.nan]}, "weights must be finite numbers, got nan"),
        ({"weights": [1.0, "x"]}, "weights must be finite numbers, got 'x'"),
    ],
)
def test_options_that_are_wrong(options, message):
    with pytest.raises(ConfigError, match=f"combine: .*{message}"):
        lora_jax.combine(ADAPTERS[:2], **options)


def test_adapters_that_do_not_fit_together():
    some, small = ADAPTERS[0], overlay(1, rank=1)
    with pytest.raises(
        StructureError,
        match=r"weights \(attention, conv, .*: ranks 2, 1, and .* or resize",
    ):
        lora_jax.combine([some, small], method="linear")
    other = {"linear": dataclasses.replace(some["linear"], layout=lora_jax.Layout("oi"))}
    with pytest.raises(StructureError, match=r"linear: factors of \(6, 5\) with layout 'io' in ad"):
        lora_jax.combine([some, other])
    with pytest.raises(StructureError, match=r"takes a list of overlays, \[adapters, ...\], got"):
        lora_jax.combine(some)
    with pytest.raises(StructureError, match="got none"):
        lora_jax.combine([])
    with pytest.raises(StructureError, match="contains no adapters"):
        lora_jax.combine([some, {}])
    parts = [{"linear": some["linear"]}, {"conv": some["conv"]}]
    with pytest.raises(StructureError, match=r"no overlay has a place for all .* pass base="):
        lora_jax.combine(parts)
    base = {path: jax.ShapeDtypeStruct(some[path].shape, "float32") for path in ("linear", "conv")}
    assert lora_jax.combine(parts, base=base).keys() == base.keys()
    with pytest.raises(StructureError, match=r"\(attention, experts, .* not in the base; nearest"):
        lora_jax.combine([some], base=base)
    joined = {path: dataclasses.replace(some[path], w=jnp.ones(some[path].shape)) for path in base}
    with pytest.raises(StructureError, match=r"conv: the base is adapted itself; pass the base of"):
        lora_jax.combine(parts, base=joined)
    base["conv"] = jax.ShapeDtypeStruct((2, 2, 3, 5), "float32")
    with pytest.raises(StructureError, match=r"conv: b is \(2, 4\), the base \(2, 2, 3, 5\) needs"):
        lora_jax.combine(parts, base=base)


@pytest.mark.slow
def test_a_randomized_svd_is_nearly_the_best():
    """Of sums whose singular values fall as those of trained adapters do."""
    rng = np.random.default_rng(0)
    falling = np.linspace(1, 0.05, 40)[None]
    nodes = [random_node(rng, "io", (30, 40), 3) for _ in range(2)]
    nodes = [dataclasses.replace(node, b=node.b * falling.astype("f4")) for node in nodes]
    combine = functools.partial(
        lora_jax.combine, [{"w": node} for node in nodes], method="ties_svd", density=0.9, rank=4
    )
    full, exact, near = (
        update(combine(**options)["w"]) for options in ({"rank": 30}, {}, {"exact": False})
    )
    best = np.linalg.norm(full - exact)
    assert 0 < best <= np.linalg.norm(full - near) < 1.02 * best
    assert np.abs(near - exact).max() > 0
