"""LoRA files of image generators, written: names, metadata, and what a file cannot hold."""

import json

import numpy as np
import pytest

import lora_jax
from lora_jax import ConfigError, StructureError, diffusion
from lora_jax.core.tree import adapted_nodes
from lora_jax.files.disk import safetensors_file
from lora_jax.files.naming import Entry, Naming
from tests.files.diffusion.models import ADAPTERS, ATTENTION, KEY, draw, node, save


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


def test_a_transformer_that_is_not_flux_keeps_the_names_of_diffusers(tmp_path):
    """Those of the original code that are written are Flux.1's, which others share in part."""
    flux, block = diffusion.naming("flux"), "transformer/transformer_blocks/0/attn"
    tree = {f"{block}/to_{x}/kernel": draw(6, 8) for x in "qkv"}
    one = {f"{block}/to_q/kernel": node(draw(6, 2), draw(2, 8), "io")}
    rows = Naming(
        (*flux.entries, Entry("transformer.{*m}.weight", "transformer/{*m}/kernel", "linear"))
    )
    tree["transformer/transformer_blocks/0/attn2/to_q/kernel"] = draw(6, 8)
    diffusion.save(tmp_path / "sd3.safetensors", one, rows, base=tree)
    names = safetensors_file.read(tmp_path / "sd3.safetensors")[0]
    assert "lora_transformer_transformer_blocks_0_attn_to_q.alpha" in names
