"""LoRA files of image generators: what has no place, and the caller's choices."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import lora_jax
from lora_jax import AdapterFileError, ConfigError, StructureError, diffusion
from lora_jax.core.layout import Layout
from lora_jax.core.tree import adapted_nodes
from lora_jax.core.weights import LoraWeight
from lora_jax.files.diffusion.meaning import meaning as meaning_of
from lora_jax.files.disk import safetensors_file
from lora_jax.files.naming import Entry, Naming
from tests.parity.peft.models import meaning

NAMING = diffusion.naming("sd15")
ATTENTION = "unet/mid_block/attentions/0/transformer_blocks/0/attn1"
KEY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
RNG = np.random.default_rng(0)


def draw(*shape, dtype="float32"):
    return RNG.normal(size=shape).astype(dtype)


BASE = {
    f"{ATTENTION}/to_q/kernel": draw(6, 8),
    f"{ATTENTION}/to_out/0/kernel": draw(8, 6),
    f"{ATTENTION}/to_out/0/bias": draw(6),
    "unet/conv_in/kernel": draw(3, 3, 4, 6),
    "unet/mid_block/attentions/0/norm/scale": draw(6),
    "text_encoder/text_model/encoder/layers/0/mlp/fc1/kernel": draw(5, 7),
}


def lora(key=KEY, out=8, ins=6, rank=2, **more):
    found = {f"{key}.lora_down.weight": draw(rank, ins), f"{key}.lora_up.weight": draw(out, rank)}
    return found | {f"{key}.{name}": x for name, x in more.items()}


def read(tmp_path, tensors, metadata=None, tree=BASE, naming=NAMING, **options):
    path = tmp_path / "lora.safetensors"
    safetensors_file.write(path, tensors, metadata)
    return diffusion.load(path, tree, naming, **options)


def loha(out=8, ins=6, rank=2, key=KEY):
    shapes = {"w1_a": (out, rank), "w1_b": (rank, ins), "w2_a": (out, rank), "w2_b": (rank, ins)}
    return {f"{key}.hada_{name}": draw(*shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_mid_block_x.lora_down.weight": draw(2, 6)}, "not in this base; nearest"),
        (lora("lora_te2_text_projection"), "lora_te2_text_projection: not in this base"),
        ({f"{KEY}.lora_down.weight": draw(2, 6)}, f"{KEY}: has down but not up"),
        ({f"{KEY}.alpha": np.array(1.0)}, "has only alpha, which makes no adapter"),
        (lora(ins=5), r"is for a weight of shape \(8, 5\), but the base's is \(8, 6\)"),
        (lora(alpha=np.array(0.0)), "alpha is 0, which trainers take for the rank"),
        (lora(alpha=draw(3)), "alpha is float32 of shape"),
        (lora(dora_scale=draw(5, 1)), r"dora_scale has shape \(5, 1\)"),
        (lora(dora_scale=draw(8, 2)), r"dora_scale has shape \(8, 2\)"),
        (lora(hada_w1_a=draw(2, 2)), "has hada_w1_a beside LoRA"),
        (lora(lora_mid=draw(2)), f"{KEY}.lora_mid: unexpected"),
        ({f"{KEY}.lora_down.weight": np.ones((2, 6), "int8")}, "has down but not up"),
        (lora() | {f"{KEY}.lora_up.weight": np.ones((8, 2), "int8")}, "up is int8, but only float"),
        (
            {f"{KEY}.weight": draw(8), f"{KEY}.on_input": np.array(0)},
            "is of IA³, which is not read",
        ),
        ({f"{KEY}.oft_blocks": draw(2, 3, 3)}, "is of OFT, which is not read here"),
        ({f"{KEY}.diff_b": draw(8)}, r"to_q.diff_b: has no place: the base has no unet.mid_block"),
        ({f"{KEY}.w_norm": draw(8)}, "attn1.to_q.weight is not of a norm"),
        (lora() | lora(f"unet.{ATTENTION[5:].replace('/', '.')}.to_q"), "and so is lora_unet_mid"),
        (loha(), 'LoHa is not of low rank here: pass full_rank=16 .*or full_rank="train"'),
        ({f"{KEY}.diff": draw(8, 6)}, "a whole difference is not of low rank here"),
        (lora(dora_scale=draw(1, 6)), "DoRA by inputs is not of low rank here"),
        (loha() | {f"{KEY}.hada_t1": draw(2, 2, 3, 3)}, "are not a product"),
        ({f"{KEY}.lokr_w1": draw(2, 2)}, "lokr_w2 is neither whole nor in two factors"),
        (
            {f"{KEY}.lokr_w1": draw(3, 2), f"{KEY}.lokr_w2": draw(4, 3)},
            r"is for a weight of shape \(12, 6\)",
        ),
    ],
)
def test_what_does_not_fit_is_listed(tensors, message, tmp_path):
    with pytest.raises(AdapterFileError, match=message) as error:
        read(tmp_path, tensors | lora("lora_unet_conv_in", 6, 4))
    assert f"{tmp_path}" in str(error.value)
    assert "lora_unet_conv_in: is for a weight of shape (6, 4)" in str(error.value)  # and this too


def test_files_of_two_texts_and_of_other_components(tmp_path):
    fc1 = "text_model_encoder_layers_0_mlp_fc1"
    tensors = lora() | lora(f"lora_te_{fc1}", 7, 5)
    for te in ("lora_te", "lora_te1"):
        nodes = adapted_nodes(read(tmp_path, lora(f"{te}_{fc1}", 7, 5)))
        assert list(nodes) == [f"text_encoder/{fc1.replace('_', '/')}/kernel".replace("t/m", "t_m")]
    tensors |= lora("lora_te2_text_projection", 3, 3)
    with pytest.raises(AdapterFileError, match="lora_te2_text_projection: not in this base"):
        read(tmp_path, tensors)
    assert list(adapted_nodes(read(tmp_path, tensors, components=["unet"]))) == [
        f"{ATTENTION}/to_q/kernel"
    ]
    with pytest.raises(ConfigError, match=r"components must be a list of unet, .*, got 'unet'"):
        read(tmp_path, tensors, components="unet")


def test_ambiguous_underscores_are_refused(tmp_path):
    rows = Naming((Entry("unet.{*m}.weight", "unet/{*m}/kernel", "linear"),))
    tree = {"unet/a/b_c/kernel": draw(6, 8), "unet/a_b/c/kernel": draw(6, 8)}
    with pytest.raises(AdapterFileError, match=r"ambiguous: it is the name of unet.a.b_c and unet"):
        read(tmp_path, lora("lora_unet_a_b_c"), tree=tree, naming=rows)
    found = adapted_nodes(read(tmp_path, lora("unet.a_b.c"), tree=tree, naming=rows))
    assert list(found) == ["unet/a_b/c/kernel"]
    adapters = {"unet/a_b/c/kernel": node(draw(6, 2), draw(2, 8), "io")}
    with pytest.raises(
        StructureError, match=r"lora_unet_a_b_c, is that of other modules too; pass"
    ):
        diffusion.save(tmp_path / "x.safetensors", adapters, rows, base=tree)
    diffusion.save(tmp_path / "x.safetensors", adapters, rows, base=tree, style="diffusers")
    found = diffusion.load(tmp_path / "x.safetensors", tree, rows)
    assert list(adapted_nodes(found)) == ["unet/a_b/c/kernel"]


def test_a_naming_without_components_is_told_what_to_do(tmp_path):
    rows = Naming((Entry("{*m}.weight", "{*m}/kernel", "linear"),))
    with pytest.raises(AdapterFileError, match=r"begin with unet\., .*; see Naming.with_prefix"):
        read(tmp_path, lora(), tree={"conv_in/kernel": draw(6, 8)}, naming=rows)


def test_closest_factors_are_the_truncated_svd(tmp_path):
    tensors = loha()
    adapters = read(tmp_path, tensors, full_rank=3)
    node = adapted_nodes(adapters)[f"{ATTENTION}/to_q/kernel"]
    a1, b1, a2, b2 = (
        tensors[f"{KEY}.hada_{x}"].astype("float64") for x in ("w1_b", "w1_a", "w2_b", "w2_a")
    )
    u, s, v = np.linalg.svd((b1 @ a1) * (b2 @ a2))
    got = (np.asarray(node.a, "float64") @ np.asarray(node.b, "float64")).T
    np.testing.assert_allclose(got, (u[:, :3] * s[:3]) @ v[:3], atol=1e-6)
    for wrong in (0, "all", True):
        with pytest.raises(ConfigError, match="full_rank must be a rank or"):
            read(tmp_path, tensors, full_rank=wrong)
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in BASE.items()}
    with pytest.raises(AdapterFileError, match=r"LoHa needs the values of unet\.mid_block"):
        read(tmp_path, tensors, tree=shapes, full_rank="train")


def test_products_of_several_ranks_by_hand():
    """Where their factors are smaller than the weight: LyCORIS' formulas in float64."""
    wide = lambda *shape: draw(*shape, dtype="float64")
    hada = {f"hada_w{n}_{x}": wide(*((30, 2), (2, 40))[x == "b"]) for n in (1, 2) for x in "ab"}
    found = meaning_of({**hada, "alpha": np.array(3.0)}, (30, 40))
    left, right = (hada[f"hada_w{n}_a"] @ hada[f"hada_w{n}_b"] for n in (1, 2))
    assert found.rank == 4
    np.testing.assert_allclose(found.update(), 1.5 * left * right, rtol=1e-12, atol=1e-13)
    kron = {"w1_a": (5, 1), "w1_b": (1, 4), "w2_a": (6, 2), "w2_b": (2, 10)}
    kron = {f"lokr_{name}": wide(*shape) for name, shape in kron.items()}
    found = meaning_of({**kron, "alpha": np.array(3.0)}, (30, 40))
    left, right = (kron[f"lokr_w{n}_a"] @ kron[f"lokr_w{n}_b"] for n in (1, 2))
    assert found.rank == 2  # and alpha counts by that of the second matrix
    np.testing.assert_allclose(found.update(), 1.5 * np.kron(left, right), rtol=1e-12, atol=1e-13)


def test_dora_by_inputs_at_a_rank_and_by_outputs_beside_a_whole_change(tmp_path):
    """By outputs the magnitude stays; by inputs it is part of the change. Full rank is exact."""
    w = BASE[f"{ATTENTION}/to_q/kernel"].T.astype("float64")  # [out, in]
    for axis, shape in ((1, (8, 1)), (0, (1, 6))):
        magnitude = np.abs(draw(*shape)) + 0.5
        tensors = loha() | {f"{KEY}.dora_scale": magnitude, f"{KEY}.alpha": np.array(1.0)}
        pairs = [tensors[f"{KEY}.hada_w{n}_a"] @ tensors[f"{KEY}.hada_w{n}_b"] for n in (1, 2)]
        total = w + 0.5 * pairs[0] * pairs[1]
        want = total * magnitude / np.linalg.norm(total, axis=axis, keepdims=True)
        for full_rank in (6, "train"):
            path = f"{ATTENTION}/to_q/kernel"
            node = adapted_nodes(read(tmp_path, tensors, full_rank=full_rank))[path]
            np.testing.assert_allclose(meaning(node, BASE[path]).T, want, atol=2e-6)
            assert (getattr(node, "magnitude", None) is not None) == (axis == 1 and full_rank == 6)


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


def node(a, b, axes, magnitude=None, scale=0.5):
    return LoraWeight(
        None, a, b, np.float32(scale), magnitude, layout=Layout(axes, ("dot_general",))
    )


ADAPTERS = {
    f"{ATTENTION}/to_q/kernel": node(draw(6, 2), draw(2, 8), "io"),
    "unet/conv_in/kernel": node(draw(3, 3, 4, 3), draw(3, 6), "iiio", draw(6)),
}


def save(tmp_path, adapters=ADAPTERS, **options):
    diffusion.save(tmp_path / "lora.safetensors", adapters, NAMING, **options)
    return safetensors_file.read(tmp_path / "lora.safetensors")


def test_written_names_shapes_and_metadata(tmp_path):
    tensors, header = save(tmp_path, metadata={"ss_output_name": "mine"})
    assert {name: x.shape for name, x in tensors.items()} == {
        f"{KEY}.alpha": (),
        f"{KEY}.lora_down.weight": (2, 6),
        f"{KEY}.lora_up.weight": (8, 2),
        "lora_unet_conv_in.alpha": (),
        "lora_unet_conv_in.dora_scale": (6, 1, 1, 1),
        "lora_unet_conv_in.lora_down.weight": (3, 4, 3, 3),
        "lora_unet_conv_in.lora_up.weight": (6, 3, 1, 1),
    }
    assert header == {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "1",
        "ss_network_args": '{"conv_dim": "3", "conv_alpha": "1.5"}',
        "ss_output_name": "mine",
    }
    tensors, _ = save(tmp_path, layout="original")
    assert "lora_unet_input_blocks_0_0.alpha" in tensors
    assert "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.alpha" in tensors
    one = {path: x for path, x in ADAPTERS.items() if x.magnitude is None}
    tensors, header = save(tmp_path, one, style="diffusers")
    assert json.loads(header["lora_adapter_metadata"])["unet.lora_alpha"] == 1
    tensors, header = save(tmp_path, one, style="diffusers", fold=True)
    assert json.loads(header["lora_adapter_metadata"])["unet.lora_alpha"] == 2
    name = f"unet.{ATTENTION[5:].replace('/', '.')}.to_q.lora_B.weight"
    np.testing.assert_array_equal(tensors[name], 0.5 * one[f"{ATTENTION}/to_q/kernel"].b.T)


@pytest.mark.parametrize(
    ("adapters", "options", "message"),
    [
        (ADAPTERS, {"style": "diffusers"}, "only some modules have DoRA; without it: unet.mid"),
        (
            {f"{ATTENTION}/to_out/0/bias": lora_jax.TrainedLeaf(None, draw(6), np.float32(1))},
            {},
            "the file holds differences, and so needs its value: pass base=",
        ),
        (
            {f"{ATTENTION}/to_out/0/bias": lora_jax.TrainedLeaf(None, draw(6), np.float32(1))},
            {"style": "diffusers"},
            "is fully trained, which these files cannot hold",
        ),
        (
            {
                "text_encoder/text_model/embeddings/token_embedding/embedding": node(
                    draw(9, 1), draw(1, 4), "io"
                )
            },
            {},
            "is of kind 'embedding', which these files cannot adapt",
        ),
        (
            {"unet/conv_in/kernel": node(draw(3, 3, 4, 1) * np.inf, draw(1, 6), "iiio")},
            {},
            "infinite",
        ),
    ],
)
def test_what_a_file_cannot_hold_is_listed(adapters, options, message, tmp_path):
    with pytest.raises(StructureError, match=message), np.errstate(invalid="ignore"):
        save(tmp_path, adapters, **options)
    assert not (tmp_path / "lora.safetensors").exists()


def test_wrong_options_and_flux_without_its_base(tmp_path):
    for option in ("style", "layout"):
        with pytest.raises(ConfigError, match=f"save: {option} must be one of .*, got 'mine'"):
            save(tmp_path, **{option: "mine"})
    with pytest.raises(
        ConfigError, match="naming: 'sd3' is not one of 'sd15', 'sd21', 'sdxl', 'flux'"
    ):
        diffusion.naming("sd3")
    flux = diffusion.naming("flux")
    block = "transformer/transformer_blocks/0/attn"
    tree = {f"{block}/to_{x}/kernel": draw(6, 8) for x in "qkv"}
    one = {f"{block}/to_q/kernel": node(draw(6, 2), draw(2, 8), "io")}
    with pytest.raises(
        StructureError, match=r"attn_qkv: joins .*to_k.weight is not known; pass base="
    ):
        diffusion.save(tmp_path / "flux.safetensors", one, flux)
    diffusion.save(tmp_path / "flux.safetensors", one, flux, base=tree)
    tensors, _ = safetensors_file.read(tmp_path / "flux.safetensors")
    up = tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"]
    assert up.shape == (24, 2) and not up[8:].any()
    back = diffusion.load(tmp_path / "flux.safetensors", tree, flux)
    np.testing.assert_array_equal(adapted_nodes(back)[f"{block}/to_q/kernel"].b, up[:8].T)
    diffusion.save(tmp_path / "flux.safetensors", one, flux, layout="diffusers")
    tensors, _ = safetensors_file.read(tmp_path / "flux.safetensors")
    assert "lora_transformer_transformer_blocks_0_attn_to_q.alpha" in tensors
    dora = one | {f"{block}/to_k/kernel": node(draw(6, 2), draw(2, 8), "io", draw(8))}
    with pytest.raises(StructureError, match="of which only some have DoRA"):
        diffusion.save(tmp_path / "flux.safetensors", dora, flux, base=tree)


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
    np.testing.assert_allclose(got, want, atol=1e-4)


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
    np.testing.assert_allclose(got, want, atol=1e-5)
    whole = {"lora_unet_double_blocks_1_img_attn_qkv.diff": draw(24, 4)}
    with pytest.raises(AdapterFileError, match="has LoRA factors and is also listed as fully"):
        read(tmp_path, tensors | whole, tree=tree, naming=rows, full_rank="train")
    with pytest.warns(UserWarning, match="a whole difference is not of low rank here"):
        found = read(tmp_path, tensors | whole, tree=tree, naming=rows, strict=False)
    assert adapted_nodes(found)["blocks/qkv"].scale.tolist() == [1, 0, 1]
    found = read(tmp_path, tensors | whole, tree=tree, naming=rows, full_rank=4)
    got = np.einsum("ir,rhe->hei", *(getattr(found["blocks/qkv"], x)[1] for x in "ab"))
    np.testing.assert_allclose(got.reshape(24, 4), *whole.values(), atol=1e-5)  # of rank 4: exact


def test_a_quantized_base(tmp_path):
    path = "unet/time_embedding/linear_1/kernel"
    tree = lora_jax.quantize({path: draw(32, 64)}, {"kernel": "int8"})
    change = draw(64, 32)
    tensors = {"lora_unet_time_embedding_linear_1.diff": change}
    found = adapted_nodes(read(tmp_path, tensors, tree=tree, full_rank="train"))[path]
    np.testing.assert_allclose(found.value, tree[path].dequantize() + change.T, atol=1e-6)
    assert adapted_nodes(read(tmp_path, tensors, tree=tree, full_rank=3))[path].rank == 3


@pytest.mark.parametrize("base", [True, False])
def test_small_files_that_ask_for_much_are_refused_first(base, tmp_path):
    """A core of a large kernel, and a Kronecker product: 10¹² numbers of 8 MB."""
    many = np.zeros((1, 10**6), "float32")
    core = {
        "lora_down.weight": many[..., None, None],
        "lora_mid.weight": many.reshape(1, 1, 1000, 1000),
    }
    core["lora_up.weight"] = np.zeros((6, 1, 1, 1), "float32")
    kron = {"lokr_w1": many.reshape(1000, 1000), "lokr_w2": many.reshape(1000, 1000)}
    key = "lora_unet_conv_in"
    for fields, of_base, alone in (
        (core, "lora_mid has the kernel", "give 1,000,000,000,000 numbers"),
        (kron, r"is for a weight of shape \(1000000, 1000000\)", None),
    ):
        tensors = {f"{key}.{name}": x for name, x in fields.items()}
        if base:
            with pytest.raises(AdapterFileError, match=of_base):
                read(tmp_path, tensors)
            continue
        safetensors_file.write(tmp_path / "lora.safetensors", tensors)
        contents = diffusion.read_file(tmp_path / "lora.safetensors").contents()
        assert contents.problems.keys() == ({key} if alone else set())
        assert alone is None or alone in contents.problems[key]
        assert not contents.factors


@pytest.mark.parametrize(
    ("module", "ending"),
    [
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q",
            "_lora.down.weight",
        ),
        ("mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out", "_lora.down.weight"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0", ".lora.down.weight"),
        (
            "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
            ".lora_A.weight",
        ),
        (
            "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q",
            ".lora_A.default.weight",
        ),
        ("lycoris_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", ".lora_down.weight"),
        (
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
            ".lora_down.weight",
        ),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", ".lora_linear_layer.down.weight"),
    ],
)
def test_names_that_are_found_in_the_wild(module, ending, tmp_path):
    out, ins = (7, 5) if "text_model" in module else (6, 8) if "to_out" in module else (8, 6)
    up = ending.replace("down", "up").replace("_A", "_B")
    tensors = {module + ending: draw(2, ins), module + up: draw(out, 2)}
    alpha = "_lora.alpha" if ending.startswith("_") else ".alpha"
    (found,) = adapted_nodes(read(tmp_path, tensors | {module + alpha: np.array(3.0)})).values()
    assert float(found.scale) == 1.5
    np.testing.assert_array_equal(found.a, tensors[module + ending].T)


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
