"""`combine` against add_weighted_adapter of PEFT, for every method, on every kind of module."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import peft
from lora_jax.adapters.algebra.combined_factors import combine_factors
from lora_jax.adapters.algebra.methods import METHODS, Recipe
from lora_jax.core.tree import adapted_nodes
from lora_jax.files.disk import safetensors_file
from tests.parity.peft import models

RECORDED = np.load(pathlib.Path(__file__).parent / "recorded" / "combined.npz")
DENSITY = 0.55
EQUAL = ["all", "rslora", "patterns"], [0.7, -1.2, 0.4]
MIXED = ["all", "small"], [-0.5, 1.5]
PRUNED = {"density": DENSITY}
FREQUENT = {"majority_sign": "frequency"}
#: Case -> the adapters and weights, and the options.
CASES = {
    "cat": (EQUAL, {}),
    "cat mixed": (MIXED, {}),
    "linear": (EQUAL, {}),
    "svd": (EQUAL, {}),
    "svd mixed": (MIXED, {}),
    "svd of rank 2": (EQUAL, {"rank": 2}),
    "ties": (EQUAL, PRUNED),
    "ties frequency": (EQUAL, PRUNED | FREQUENT),
    "ties_svd": (EQUAL, PRUNED),
    "ties_svd frequency": (EQUAL, PRUNED | FREQUENT),
    "magnitude_prune": (EQUAL, PRUNED),
    "magnitude_prune_svd": (EQUAL, PRUNED),
    "magnitude_prune_svd mixed": (MIXED, {"density": 0.2}),
}
QUICK = ["cat", "linear", "ties frequency", "ties_svd"]
DARE = ["dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd"]
pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    @functools.cache
    def load(place, which):
        folder = tmp_path_factory.mktemp(place.replace("/", "_"))
        for file in (peft.CONFIG, peft.TENSORS):
            (folder / file).write_bytes(RECORDED[f"{place}/{file}"].tobytes())
        return peft.load(folder, models.shapes(which), models.NAMINGS[which])

    return load


def update(node):
    return models.meaning(node, np.zeros(node.shape, np.float32))


def close(got, want, name):
    size = max(np.abs(want).max(), 1)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6 * size, err_msg=name)


@pytest.mark.parametrize("case", QUICK)
def test_numbers_of_peft(case, load):
    compare(case, "stacked", load, ["model/layers/up/kernel", "model/emb/embedding"])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", ["plain", "stacked"])
def test_numbers_of_peft_on_every_module(case, which, load):
    compare(case, which, load)


def compare(case, which, load, paths=None):
    """Compare A, B and scales, or the updates of an SVD, with what PEFT has combined."""
    (names, weights), options = CASES[case]
    method = case.split()[0]
    adapters = [load(f"adapters/{name}", which) for name in names]
    want = adapted_nodes(load(f"cases/{case}", which))
    assert len(want) == {"plain": 11, "stacked": 5}[which]
    if paths is not None:
        want = {path: want[path] for path in paths}
        adapters = [{path: nodes[path] for path in paths} for nodes in adapters]
    got = adapted_nodes(lora_jax.combine(adapters, weights, method=method, **options))
    assert got.keys() == want.keys()
    for path, node in want.items():
        close(update(got[path]), update(node), path)
        np.testing.assert_array_equal(got[path].scale, node.scale, path)
        if METHODS[method].sums == "factors":
            close(got[path].a, np.asarray(node.a), path)
            close(got[path].b, np.asarray(node.b), path)


@pytest.mark.parametrize("method", DARE)
def test_dare_with_the_masks_that_peft_drew(method, load):
    """The masks are random, so they are recorded; all else is computed."""
    names, weights = EQUAL
    masks, _ = safetensors_file.decode(RECORDED[f"masks/{method}"].tobytes(), method)
    want = adapted_nodes(load(f"cases/{method}", "plain"))
    recipe = Recipe(METHODS[method], DENSITY, rank=3)
    for path in ["model/layers/1/up/kernel"]:  # which two of the adapters have
        overlays = [adapted_nodes(load(f"adapters/{name}", "plain")) for name in names]
        there = [i for i, nodes in enumerate(overlays) if path in nodes]
        module = path.removesuffix("/kernel").replace("/", ".")

        def draw(number, i, shape, there=there, module=module):
            if recipe.method.sums == "factors":  # PEFT draws for all A's, then for all B's
                number, side = divmod(number, 2)
                number += side * len(there)
            mask = masks[f"{module}/{number}"].T.astype(bool)
            assert mask.shape == shape
            return jnp.asarray(mask)

        nodes = [overlays[i][path] for i in there]
        own = np.array(weights)[there]
        got = jax.jit(lambda nodes: combine_factors(nodes, own, None, recipe, draw))(nodes)  # noqa: B023
        close(update(got), update(want[path]), path)


def test_dare_draws_its_own_masks_with_pefts_expectation(load):
    names, weights = EQUAL
    path = "model/layers/up/kernel"
    adapters = [{path: load(f"adapters/{name}", "stacked")[path]} for name in names]
    combine = functools.partial(lora_jax.combine, adapters, weights)
    draw = lambda key: combine(method="dare_linear", density=0.8, key=key)[path].a
    values = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 400)))
    error = values.std(0).max() / np.sqrt(len(values))
    plain = combine(method="linear")[path].a
    assert error > 0 and np.abs(values.mean(0) - plain).max() < 4.5 * error


@pytest.mark.slow
def test_intruders_reduced_as_peft_does(load):
    """PEFT's A and B are those of the rank that the adapter had."""
    base = models.base("plain")
    start = {path: x for path, x in base.items() if path.endswith(("up/kernel", "down/kernel"))}
    adapters = {path: load("adapters/linear", "plain")[path] for path in start}
    options = {"k": 4, "threshold": 0.8}
    params = lora_jax.join(start, adapters)
    found = lora_jax.intruders(params, **options)
    counts = {path: int(x.count) for path, x in found.items()}
    order = [f"model/layers/{n}/{name}/kernel" for n in range(3) for name in ("up", "down")]
    assert [counts[path] for path in order] == RECORDED["intruders/counts"].tolist()
    got = lora_jax.reduce_intruders(params, 0.3, rank=3, **options)
    want = adapted_nodes(load("intruders", "plain"))
    assert want.keys() == start.keys()
    for path, node in want.items():
        close(update(got[path]), update(node), path)
