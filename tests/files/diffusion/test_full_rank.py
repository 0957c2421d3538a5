"""Changes that are not of low rank: the closest factors, or fully trained weights."""

import jax
import numpy as np
import pytest

import lora_jax
from lora_jax import AdapterFileError, ConfigError, diffusion
from lora_jax.core.tree import adapted_nodes
from tests.files.diffusion.models import ATTENTION, BASE, KEY, draw, glora, loha, lora, read
from tests.parity.peft.models import meaning


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


def test_a_quantized_base(tmp_path):
    path = "unet/time_embedding/linear_1/kernel"
    tree = lora_jax.quantize({path: draw(32, 64)}, {"kernel": "int8"})
    change = draw(64, 32)
    tensors = {"lora_unet_time_embedding_linear_1.diff": change}
    found = adapted_nodes(read(tmp_path, tensors, tree=tree, full_rank="train"))[path]
    np.testing.assert_allclose(found.value, tree[path].dequantize() + change.T, atol=1e-6)
    assert adapted_nodes(read(tmp_path, tensors, tree=tree, full_rank=3))[path].rank == 3


def test_glora_is_of_low_rank_once_the_base_has_values(tmp_path):
    """`W·a1·a2 + b1·b2` of rank 1 has factors of rank 2, and a 3x3 kernel's has ten."""
    path, w = f"{ATTENTION}/to_q/kernel", BASE[f"{ATTENTION}/to_q/kernel"].T.astype("float64")
    tensors = glora() | {f"{KEY}.alpha": np.array(0.5)}
    a1, a2, b1, b2 = (
        tensors[f"{KEY}.{x}.weight"].astype("float64") for x in ["a1", "a2", "b1", "b2"]
    )
    found = adapted_nodes(read(tmp_path, tensors))[path]
    assert found.rank == 2
    np.testing.assert_allclose(
        meaning(found, BASE[path]).T, w + 0.5 * (w @ a1 @ a2 + b1 @ b2), atol=2e-6
    )
    tree, conv = (
        {"unet/conv_in/kernel": draw(3, 3, 16, 128)},
        glora(128, 16, 1, "lora_unet_conv_in"),
    )
    conv["lora_unet_conv_in.b2.weight"] = draw(1, 16, 3, 3)
    whole = read(tmp_path, conv, tree=tree, full_rank="train")["unet/conv_in/kernel"]
    assert whole.rank == 10
    a1, a2, b1, b2 = (conv[f"lora_unet_conv_in.{x}.weight"] for x in ["a1", "a2", "b1", "b2"])
    kernel = tree["unet/conv_in/kernel"].astype("float64")
    want = kernel + np.einsum("hwio,ij->hwjo", kernel, a1 @ a2) + np.einsum("or,rihw->hwio", b1, b2)
    np.testing.assert_allclose(meaning(whole, tree["unet/conv_in/kernel"]), want, atol=1e-5)


def test_what_changes_a_base_needs_its_values(tmp_path):
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in BASE.items()}
    for tensors, name in (
        (glora(), "GLoRA"),
        ({f"{KEY}.oft_blocks": draw(2, 4, 4)}, "OFT"),
        ({f"{KEY}.weight": draw(8), f"{KEY}.on_input": np.array(0)}, "IA³"),
    ):
        for full_rank in (None, 2, "train"):
            with pytest.raises(AdapterFileError, match=rf"{name} needs the values of unet\.mid_bl"):
                read(tmp_path, tensors, tree=shapes, full_rank=full_rank)
        contents = diffusion.read_file(tmp_path / "lora.safetensors").contents()
        assert contents.variant == name and contents.others.keys() == tensors.keys()


def test_oft_of_the_trainer_and_its_limit(tmp_path):
    """kohya's prefix; the norm of all skew parts is at most alpha times the outputs."""
    key, blocks = KEY.replace("lora_", "oft_"), draw(2, 4, 4).astype("float64")
    skew = blocks - blocks.transpose(0, 2, 1)
    skew *= 0.01 * 8 / np.linalg.norm(skew)
    turns = [(np.eye(4) + x) @ np.linalg.inv(np.eye(4) - x) for x in skew]
    path, w = f"{ATTENTION}/to_q/kernel", BASE[f"{ATTENTION}/to_q/kernel"].T.astype("float64")
    want = np.concatenate([turn.T @ part for turn, part in zip(turns, np.split(w, 2), strict=True)])
    tensors = {f"{key}.oft_blocks": blocks.astype("float32"), f"{key}.alpha": np.array(0.01, "f4")}
    found = adapted_nodes(read(tmp_path, tensors, full_rank="train"))[path]
    np.testing.assert_allclose(found.value.T, want, atol=1e-6)


def test_the_base_of_swapped_halves_is_swapped_too(tmp_path):
    """DoRA by inputs, and IA³, of Flux's last modulation: the file has shift first."""
    path, key = "transformer/norm_out/linear/kernel", "lora_unet_final_layer_adaLN_modulation_1"
    tree, rows = {path: draw(6, 8)}, diffusion.naming("flux")
    w = np.roll(tree[path].T.astype("float64"), 4, 0)  # in the file's order
    tensors = lora(key) | {f"{key}.dora_scale": np.abs(draw(1, 6)) + 0.5}
    total = w + tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
    dora = total * tensors[f"{key}.dora_scale"] / np.linalg.norm(total, axis=0)
    gains = draw(8)
    ia3 = {f"{key}.weight": gains, f"{key}.on_input": np.array(0)}
    for file, want in ((tensors, dora), (ia3, w * (1 + gains[:, None]))):
        found = read(tmp_path, file, tree=tree, naming=rows, full_rank="train")[path]
        np.testing.assert_allclose(np.roll(found.value.T, 4, 0), want, atol=2e-6)
