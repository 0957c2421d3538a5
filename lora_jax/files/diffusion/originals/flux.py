"""Flux.1 and Flux.2 of Black Forest Labs, and the names of X-Labs' trainer."""

from lora_jax.files.diffusion.originals.row import Original, block, outside

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_DOUBLE, _SINGLE = "transformer_blocks.{n}", "single_transformer_blocks.{n}"
_LAST = Original("final_layer.adaLN_modulation.1", ("norm_out.linear",), halves=True)
_NORMS = {
    f"{side}_attn.norm.{one}_norm": f"attn.norm_{added}{one[0]}"
    for side, added in (("img", ""), ("txt", "added_"))
    for one in ("query", "key")
}


def _embedders(to: str, **others: str) -> dict[str, str]:
    return {
        f"{name}_in.{side}_layer": f"{to}.{other}_embedder.linear_{i}"
        for name, other in others.items()
        for i, side in enumerate(("in", "out"), 1)
    }


#: Those that `save` writes come first.
FLUX = (
    *outside({"img_in": "x_embedder", "txt_in": "context_embedder"}),
    *outside(_embedders("time_text_embed", time="timestep", vector="text", guidance="guidance")),
    *outside({"final_layer.linear": "proj_out"}),
    _LAST,
    *block(
        "double_blocks.{n}",
        _DOUBLE,
        {
            "img_attn.qkv": _QKV,
            "img_attn.proj": "attn.to_out.0",
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "img_mod.lin": "norm1.linear",
            "txt_attn.qkv": _ADDED,
            "txt_attn.proj": "attn.to_add_out",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
            "txt_mod.lin": "norm1_context.linear",
            **_NORMS,
        },
    ),
    *block(
        "single_blocks.{n}",
        _SINGLE,
        {
            "linear1": (*_QKV, "proj_mlp"),
            "linear2": "proj_out",
            "modulation.lin": "norm.linear",
            "norm.query_norm": "attn.norm_q",
            "norm.key_norm": "attn.norm_k",
        },
    ),
)
X_LABS = (
    *block(
        "double_blocks.{n}.processor",
        _DOUBLE,
        {
            "qkv_lora1": _QKV,
            "qkv_lora2": _ADDED,
            "proj_lora1": "attn.to_out.0",
            "proj_lora2": "attn.to_add_out",
        },
    ),
    *block("single_blocks.{n}.processor", _SINGLE, {"qkv": _QKV, "proj": "proj_out"}),
)
#: Where they are not Flux.1's; a model whose projections are fused has `to_qkv`.
FLUX2 = (
    *outside(_embedders("time_guidance_embed", time="timestep", guidance="guidance")),
    *outside(
        {
            f"{name}.lin": f"{name}.linear"
            for name in (
                "single_stream_modulation",
                "double_stream_modulation_img",
                "double_stream_modulation_txt",
            )
        }
    ),
    *block(
        "double_blocks.{n}",
        _DOUBLE,
        {
            "img_attn.qkv": "attn.to_qkv",
            "txt_attn.qkv": "attn.to_added_qkv",
            "img_mlp.0": "ff.linear_in",
            "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in",
            "txt_mlp.2": "ff_context.linear_out",
        },
    ),
    *block(
        "single_blocks.{n}",
        _SINGLE,
        {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"},
    ),
)
