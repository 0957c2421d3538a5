"""Which tensor of a Hugging Face file is which leaf of `Decoder`."""

from collections.abc import Iterator

from lora_jax.files.naming import Entry, Naming
from lora_jax.models.weights.linear_entries import linear_entries


def _decoder_layers(path: str, stacked: bool) -> Iterator[Entry]:
    prefix = "model.layers.{n}"
    for torch, ours in {
        "self_attn.q_proj": "attention/query",
        "self_attn.k_proj": "attention/key",
        "self_attn.v_proj": "attention/value",
        "self_attn.o_proj": "attention/output",
        "mlp.gate_proj": "mlp/gate",
        "mlp.up_proj": "mlp/up",
        "mlp.down_proj": "mlp/down",
    }.items():
        yield from linear_entries(f"{prefix}.{torch}", f"{path}/{ours}", stacked)
    axes = "d -> n d" if stacked else ""
    for torch, ours in {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "mlp_norm",
    }.items():
        yield Entry(f"{prefix}.{torch}.weight", f"{path}/{ours}/scale", "", axes)


#: Llama, Mistral and Qwen2, with stacked layers or not: a tree has leaves of only one sort.
LLAMA = Naming(
    (
        Entry("model.embed_tokens.weight", "embedding/embedding", "embedding"),
        *_decoder_layers("layer_{n}", stacked=False),
        *_decoder_layers("layers", stacked=True),
        Entry("model.norm.weight", "norm/scale"),
        *linear_entries("lm_head", "head"),
    )
)
