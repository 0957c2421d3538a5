"""What layers recompute: the same gradients, fewer bytes, and which products run again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.models.decoder.module import Decoder
from lora_jax.models.remat import POLICIES
from tests.models.decoder.test_decoder import TINY, drawn
from tests.programs.jaxprs import equations


def gradient(remat, length, *, scan, **sizes):
    """Return the gradient of the adapters as a function, and the adapters."""
    config = dataclasses.replace(TINY, scan=scan, remat=remat, **sizes)
    model, ids = Decoder(config), np.arange(2 * length, dtype=np.int32).reshape(2, length) % 19
    shapes = jax.eval_shape(model.init, jax.random.key(1), ids[:, :4])
    params = jax.tree_util.tree_map_with_path(drawn, shapes)
    chosen = lora.LoraConfig(rank=2, targets=["query/kernel", "down/kernel"])
    base, adapters = lora.split(
        lora.init(jax.random.key(2), params, chosen, model.apply, ids[:, :4])
    )
    apply = lora.lora(model.apply, on_dense="error")
    of = lambda adapters: jnp.sin(apply(lora.join(base, adapters), ids)).sum()
    return jax.grad(of), adapters


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
def test_gradients_are_the_same(scan, quick_compile):
    found = []
    for remat in (*POLICIES, True):
        grad, adapters = gradient(remat, 9, scan=scan)
        found.append(jax.jit(grad)(adapters))
    for other in found[1:]:
        for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_later_policies_take_less_memory(optimized):
    needed = []
    for remat in POLICIES:
        sizes = {"max_position_embeddings": 96, "num_hidden_layers": 8}
        grad, adapters = gradient(remat, 96, scan=True, **sizes)
        needed.append(jax.jit(grad).lower(adapters).compile().memory_analysis().temp_size_in_bytes)
    none, sums, full = needed
    assert none > 3 * sums and sums > 1.1 * full


def test_sums_recompute_no_product_of_a_layer_with_its_weights():
    """The gate's kernel meets the layer's input, and in the backward pass a gradient; no more."""

    def products(remat):
        grad, adapters = gradient(remat, 9, scan=True)
        made = equations(jax.make_jaxpr(grad)(adapters))
        shape = (TINY.hidden_size, TINY.intermediate_size)  # of gate and up
        return sum(
            eqn.primitive.name == "dot_general" and any(x.aval.shape == shape for x in eqn.invars)
            for eqn in made
        )

    assert [products(remat) for remat in POLICIES] == [4, 4, 6]


@pytest.mark.parametrize("remat", ["some", 1, None])
def test_unknown_policies(remat):
    with pytest.raises(ValueError, match=r"DecoderConfig: remat .* is not True, False or one of"):
        dataclasses.replace(TINY, remat=remat)
