"""Stable Diffusion 3, Lumina 2, Z-Image, Wan and HunyuanVideo in their own code."""

from collections.abc import Mapping

from lora_jax.files.diffusion.originals.row import Original, block, outside

_LAST = Original("final_layer.adaLN_modulation.1", ("norm_out.linear",), halves=True)


def _qkv(attention: str) -> tuple[str, ...]:
    return tuple(f"{attention}.to_{x}" for x in "qkv")


def _of_refiners(inside: str, names: Mapping[str, str | tuple[str, ...]]) -> tuple[Original, ...]:
    """Return the rows of layers and of both refiners, whose names are inside theirs."""
    kinds = ("layers", "noise_refiner", "context_refiner")
    places = [f"{kind}.{{n}}{inside}" for kind in kinds]
    return tuple(row for place in places for row in block(place, place, names))


_ADDED = tuple(f"attn.add_{x}_proj" for x in "qkv")
#: Without the modulation of the text, whose halves are swapped in the last block alone.
SD3 = (
    *outside(
        {
            "x_embedder.proj": "pos_embed.proj",
            "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
            "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
            "final_layer.linear": "proj_out",
        }
    ),
    _LAST,
    *block(
        "joint_blocks.{n}",
        "transformer_blocks.{n}",
        {
            "x_block.attn.qkv": _qkv("attn"),
            "x_block.attn.proj": "attn.to_out.0",
            "x_block.attn2.qkv": _qkv("attn2"),
            "x_block.attn2.proj": "attn2.to_out.0",
            "x_block.mlp.fc1": "ff.net.0.proj",
            "x_block.mlp.fc2": "ff.net.2",
            "x_block.adaLN_modulation.1": "norm1.linear",
            "context_block.attn.qkv": _ADDED,
            "context_block.attn.proj": "attn.to_add_out",
            "context_block.mlp.fc1": "ff_context.net.0.proj",
            "context_block.mlp.fc2": "ff_context.net.2",
        },
    ),
)
LUMINA = _of_refiners(
    "",
    {
        "attention.qkv": _qkv("attn"),
        "attention.out": "attn.to_out.0",
        "feed_forward.w1": "feed_forward.linear_1",
        "feed_forward.w2": "feed_forward.linear_2",
        "feed_forward.w3": "feed_forward.linear_3",
        "adaLN_modulation.1": "norm1.linear",
    },
)
#: Whose other modules diffusers calls as the original does.
Z_IMAGE = _of_refiners(".attention", {"qkv": ("to_q", "to_k", "to_v"), "out": "to_out.0"})
WAN = (
    *outside(
        {
            "text_embedding.0": "condition_embedder.text_embedder.linear_1",
            "text_embedding.2": "condition_embedder.text_embedder.linear_2",
            "time_embedding.0": "condition_embedder.time_embedder.linear_1",
            "time_embedding.2": "condition_embedder.time_embedder.linear_2",
            "time_projection.1": "condition_embedder.time_proj",
            "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
            "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
            "head.head": "proj_out",
        }
    ),
    *block(
        "blocks.{n}",
        "blocks.{n}",
        {
            f"{own}.{x}": f"{to}.{part}"
            for own, to in (("self_attn", "attn1"), ("cross_attn", "attn2"))
            for x, part in {
                **{x: f"to_{x}" for x in "qkv"},
                "o": "to_out.0",
                "k_img": "add_k_proj",
                "v_img": "add_v_proj",
                "norm_q": "norm_q",
                "norm_k": "norm_k",
                "norm_k_img": "norm_added_k",
            }.items()
        }
        | {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2", "norm3": "norm2"},
    ),
)
_REFINER = "context_embedder.token_refiner.refiner_blocks.{n}"
HUNYUAN = (
    *outside(
        {
            "img_in.proj": "x_embedder.proj",
            "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
            "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
            "txt_in.input_embedder": "context_embedder.proj_in",
            "txt_in.t_embedder.mlp.0": (
                "context_embedder.time_text_embed.timestep_embedder.linear_1"
            ),
            "txt_in.t_embedder.mlp.2": (
                "context_embedder.time_text_embed.timestep_embedder.linear_2"
            ),
            "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
            "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
        }
    ),
    *block(
        "double_blocks.{n}",
        "transformer_blocks.{n}",
        {
            "img_attn_qkv": _qkv("attn"),
            "img_attn_proj": "attn.to_out.0",
            "img_mlp.fc1": "ff.net.0.proj",
            "img_mlp.fc2": "ff.net.2",
            "img_mod.linear": "norm1.linear",
            "txt_attn_qkv": _ADDED,
            "txt_attn_proj": "attn.to_add_out",
            "txt_mlp.fc1": "ff_context.net.0.proj",
            "txt_mlp.fc2": "ff_context.net.2",
            "txt_mod.linear": "norm1_context.linear",
        },
    ),
    *block(
        "single_blocks.{n}", "single_transformer_blocks.{n}", {"modulation.linear": "norm.linear"}
    ),
    *block(
        "txt_in.individual_token_refiner.blocks.{n}",
        _REFINER,
        {
            "self_attn_qkv": _qkv("attn"),
            "self_attn_proj": "attn.to_out.0",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
            "adaLN_modulation.1": "norm_out.linear",
        },
    ),
)
