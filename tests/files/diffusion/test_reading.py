"""LoRA files of image generators, read onto a base: dtypes, scales, kernels and stacks."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import lora_jax
from lora_jax import AdapterFileError
from lora_jax.core.tree import adapted_nodes
from lora_jax.files.diffusion.meaning import meaning
from lora_jax.files.diffusion.weight import Weight
from lora_jax.files.naming import Entry, Naming
from tests.files.diffusion.models import ATTENTION, BASE, KEY, draw, loha, lora, read


def test_kernels_of_ones_and_sixteen_bits(tmp_path):
    """A 1x1 convolution may be written for a linear layer; plain factors keep their dtype."""
    down, up = draw(2, 6, 1, 1, dtype="float16"), draw(8, 2, 1, 1, dtype="float16")
    tensors = {f"{KEY}.lora_down.weight": down, f"{KEY}.lora_up.weight": up}
    alpha = {f"{KEY}.alpha": np.array(3, "int64")}
    node = adapted_nodes(read(tmp_path, tensors | alpha))[f"{ATTENTION}/to_q/kernel"]
    assert node.a.dtype == "float16" and float(node.scale) == 1.5
    np.testing.assert_array_equal(node.a, down.reshape(2, 6).T)
    tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in loha(rank=1).items()}
    node = adapted_nodes(read(tmp_path, tensors))[f"{ATTENTION}/to_q/kernel"]
    assert (
        node.a.dtype == "float32" and node.rank == 1
    )  # a product of 16-bit numbers is exact there


def test_alphas_and_metadata(tmp_path):
    local = f"{ATTENTION[5:].replace('/', '.')}.to_q"
    tensors = lora(f"unet.{local}")
    tensors = {
        n.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): x for n, x in tensors.items()
    }
    header = lambda **values: {"lora_adapter_metadata": json.dumps(values)}
    scale = lambda **values: float(
        adapted_nodes(read(tmp_path, tensors, header(**values)))[f"{ATTENTION}/to_q/kernel"].scale
    )
    assert float(adapted_nodes(read(tmp_path, tensors))[f"{ATTENTION}/to_q/kernel"].scale) == 1
    assert scale(**{"unet.r": 2, "unet.lora_alpha": 5}) == 2.5
    assert scale(r=2, lora_alpha=3) == 1.5  # of `save_lora_adapter`
    patterns = {"unet.alpha_pattern": {local: 7}, "unet.rank_pattern": {local: 2}}
    assert scale(**{"unet.r": 9, "unet.lora_alpha": 5}, **patterns) == 3.5
    for values, message in (
        ({"unet.r": 3}, "has rank 2, but lora_adapter_metadata says 3"),
        ({"unet.r": -1}, "lora_adapter_metadata of unet: r must be a positive integer"),
        ({"unet.r": 2, "unet.init_lora_weights": "pissa"}, "PiSSA changed the base"),
    ):
        with pytest.raises(AdapterFileError, match=message):
            scale(**values)
    with pytest.raises(AdapterFileError, match="lora_adapter_metadata"):
        read(tmp_path, tensors, {"lora_adapter_metadata": "{"})


def test_a_convolution_adapted_from_a_file_computes_as_its_merged_kernel(tmp_path):
    """From the file to the engine: HWIO, 3x3."""
    key = "lora_unet_conv_in"
    tensors = {
        f"{key}.lora_down.weight": draw(2, 4, 3, 3),
        f"{key}.lora_up.weight": draw(6, 2, 1, 1),
    }
    adapters = read(tmp_path, tensors | {f"{key}.alpha": np.array(1.0)})
    call = lambda p, x: jax.lax.conv_general_dilated(
        x, p["unet/conv_in/kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = jnp.asarray(draw(1, 5, 5, 4))
    got = lora_jax.lora(call)(lora_jax.join(BASE, adapters), x)
    delta = np.einsum(
        "or,rihw->hwio",
        tensors[f"{key}.lora_up.weight"][..., 0, 0],
        tensors[f"{key}.lora_down.weight"],
    )
    want = call(BASE | {"unet/conv_in/kernel": BASE["unet/conv_in/kernel"] + 0.5 * delta}, x)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_layers_that_are_stacked_and_fused_in_the_tree(tmp_path):
    """BFL's dotted names, onto one leaf [layers, in, heads, head_dim] of all q, k and v."""
    names = [f"transformer.transformer_blocks.{{n}}.attn.to_{x}.weight" for x in "qkv"]
    rows = Naming((Entry(names, "blocks/qkv", "linear", "(h e) i -> n i h e", {"e": 2}),))
    tree, tensors = {"blocks/qkv": draw(3, 4, 12, 2)}, {}
    for n in (0, 2):
        key = f"diffusion_model.double_blocks.{n}.img_attn.qkv"
        tensors |= {f"{key}.lora_A.weight": draw(2 + n, 4), f"{key}.lora_B.weight": draw(24, 2 + n)}
    found = adapted_nodes(read(tmp_path, tensors, tree=tree, naming=rows))["blocks/qkv"]
    assert found.rank == 4 and found.scale.tolist() == [1, 0, 1]  # layer 1 is not in the file
    want = tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
    got = np.einsum("ir,rhe->hei", found.a[2], found.b[2]).reshape(24, 4)
    np.testing.assert_allclose(got, want, atol=3e-6)
    whole = {"lora_unet_double_blocks_1_img_attn_qkv.diff": draw(24, 4)}
    with pytest.raises(AdapterFileError, match="has LoRA factors and is also listed as fully"):
        read(tmp_path, tensors | whole, tree=tree, naming=rows, full_rank="train")
    with pytest.warns(UserWarning, match="a whole difference is not of low rank here"):
        found = read(tmp_path, tensors | whole, tree=tree, naming=rows, strict=False)
    assert adapted_nodes(found)["blocks/qkv"].scale.tolist() == [1, 0, 1]
    found = read(tmp_path, tensors | whole, tree=tree, naming=rows, full_rank=4)
    got = np.einsum("ir,rhe->hei", *(getattr(found["blocks/qkv"], x)[1] for x in "ab"))
    np.testing.assert_allclose(got.reshape(24, 4), *whole.values(), atol=1e-6)  # of rank 4: exact


def test_the_bias_of_b_counts_with_the_scale(tmp_path):
    key, path = (
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
        f"{ATTENTION}/to_out/0",
    )
    bias = draw(6)
    tensors = {f"{key}.lora_A.weight": draw(2, 8), f"{key}.lora_B.weight": draw(6, 2)}
    tensors |= {f"{key}.alpha": np.array(3.0), f"{key}.lora_B.bias": bias}
    found = adapted_nodes(read(tmp_path, tensors))
    want = BASE[f"{path}/bias"] + 1.5 * bias
    np.testing.assert_allclose(found[f"{path}/bias"].value, want, atol=1e-6)
    assert found[f"{path}/kernel"].rank == 2
    with pytest.raises(AdapterFileError, match=r"lora_B.bias is unet.*bias, and so is .*diff_b of"):
        read(tmp_path, tensors | {f"{key}.diff_b": draw(6)})
    by_inputs = tensors | {f"{key}.dora_scale": np.abs(draw(1, 8))}
    with pytest.raises(AdapterFileError, match=r"lora_B\.bias is not read beside DoRA"):
        read(tmp_path, by_inputs, full_rank=2)


def test_norms_by_their_other_names(tmp_path):
    """ComfyUI's "diff" is added to a norm's weight, "scale" of Black Forest Labs replaces it."""
    path, key = "unet/mid_block/attentions/0/norm/scale", "diffusion_model.middle_block.1.norm"
    x = draw(6)
    found = adapted_nodes(read(tmp_path, {f"{key}.diff": x}))[path]
    np.testing.assert_allclose(found.value, BASE[path] + x, atol=1e-6)
    tree = {p: jax.ShapeDtypeStruct(value.shape, value.dtype) for p, value in BASE.items()}
    found = adapted_nodes(read(tmp_path, {f"{key}.scale": x}, tree=tree))[path]
    np.testing.assert_array_equal(found.value, x)
    for wrong, message in (
        ({f"{key}.scale": x, f"{key}.w_norm": x}, r"norm.weight, and so is .*w_norm of this file"),
        ({f"{key}.scale": draw(5)}, r"has shape \(5,\), but the base needs \(6,\)"),
        ({f"{KEY}.scale": draw(8)}, "attn1.to_q.weight is not of a norm"),
    ):
        with pytest.raises(AdapterFileError, match=message):
            read(tmp_path, wrong)


def test_products_of_several_ranks_by_hand():
    """Where their factors are smaller than the weight: LyCORIS' formulas in float64."""
    wide = lambda *shape: draw(*shape, dtype="float64")
    hada = {f"hada_w{n}_{x}": wide(*((30, 2), (2, 40))[x == "b"]) for n in (1, 2) for x in "ab"}
    found = meaning({**hada, "alpha": np.array(3.0)}, Weight((30, 40)))
    left, right = (hada[f"hada_w{n}_a"] @ hada[f"hada_w{n}_b"] for n in (1, 2))
    assert found.rank == 4
    np.testing.assert_allclose(found.update(), 1.5 * left * right, rtol=1e-12, atol=1e-13)
    kron = {"w1_a": (5, 1), "w1_b": (1, 4), "w2_a": (6, 2), "w2_b": (2, 10)}
    kron = {f"lokr_{name}": wide(*shape) for name, shape in kron.items()}
    found = meaning({**kron, "alpha": np.array(3.0)}, Weight((30, 40)))
    left, right = (kron[f"lokr_w{n}_a"] @ kron[f"lokr_w{n}_b"] for n in (1, 2))
    assert found.rank == 2  # and alpha counts by that of the second matrix
    np.testing.assert_allclose(found.update(), 1.5 * np.kron(left, right), rtol=1e-12, atol=1e-13)
