"""Which tensor of a Hugging Face file is which leaf of the models here, and what to ignore."""

from collections.abc import Collection, Iterator

from lora_jax.files.naming import Entry, Naming


def _linear_entries(torch: str, path: str, stacked: bool = False) -> Iterator[Entry]:
    """Yield a linear layer's weight and bias; with `stacked` all layers share one leaf."""
    axes, bias = ("o i -> n i o", "o -> n o") if stacked else ("", "")
    yield Entry(f"{torch}.weight", f"{path}/kernel", "linear", axes)
    yield Entry(f"{torch}.bias", f"{path}/bias", "", bias)


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
        yield from _linear_entries(f"{prefix}.{torch}", f"{path}/{ours}", stacked)
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
        *_linear_entries("lm_head", "head"),
    )
)


def _bert_naming(scale: str, bias: str) -> Naming:
    """Return BERT's naming; old files call the scale and bias of a norm gamma and beta."""

    def norm(torch: str, path: str) -> Iterator[Entry]:
        yield Entry(f"{torch}.LayerNorm.{scale}", f"{path}/scale")
        yield Entry(f"{torch}.LayerNorm.{bias}", f"{path}/bias")

    prefix = "encoder.layer.{n}"
    return Naming(
        (
            *(
                Entry(f"embeddings.{x}_embeddings.weight", f"embeddings/{y}/embedding", "embedding")
                for x, y in {"word": "word", "position": "position", "token_type": "type"}.items()
            ),
            *norm("embeddings", "embeddings/norm"),
            *(
                entry
                for name in ("query", "key", "value")
                for entry in _linear_entries(
                    f"{prefix}.attention.self.{name}", f"layer_{{n}}/attention/{name}"
                )
            ),
            *_linear_entries(f"{prefix}.attention.output.dense", "layer_{n}/attention/output"),
            *norm(f"{prefix}.attention.output", "layer_{n}/attention_norm"),
            *_linear_entries(f"{prefix}.intermediate.dense", "layer_{n}/intermediate"),
            *_linear_entries(f"{prefix}.output.dense", "layer_{n}/output"),
            *norm(f"{prefix}.output", "layer_{n}/output_norm"),
        )
    )


BERT = _bert_naming("weight", "bias")
_OLD_BERT = _bert_naming("gamma", "beta")
NAMINGS = {"bert": BERT, "llama": LLAMA}

#: Regexes of tensors that are not parameters of the model, but kept and saved with it.
KEPT = {
    "bert": (
        r"(bert\.)?embeddings\.position_ids",
        r"(bert\.)?pooler\..*",
        r"cls\..*",
        r"classifier\..*",
    ),
    "llama": (r"score\..*",),
}
#: Regexes of tensors that follow from the rest: rotations, and the copy of a tied head.
DROPPED = {"bert": (), "llama": (r".*\.rotary_emb\.inv_freq",)}
TIED_HEAD = r"lm_head\.weight"


def naming(kind: str, names: Collection[str] = ()) -> Naming:
    """Return the naming of a kind of model, "bert" or "llama".

    Args:
      kind: the kind.
      names: the tensor names in a file, if there is one: they may have the prefix "bert.".
    """
    if kind != "bert":
        return NAMINGS[kind]
    table = _OLD_BERT if any(name.endswith("LayerNorm.gamma") for name in names) else BERT
    return table.with_prefix("bert.") if any(n.startswith("bert.") for n in names) else table
