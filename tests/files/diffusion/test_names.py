"""What files of image generators call modules, and components that are left out."""

import numpy as np
import pytest

from lora_jax import AdapterFileError, ConfigError, StructureError, diffusion
from lora_jax.core.tree import adapted_nodes
from lora_jax.files.naming import Entry, Naming
from tests.files.diffusion.models import ATTENTION, draw, lora, node, read


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
