"""Which tensor of a Hugging Face file is which leaf of `Decoder`."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from functools import partial

from lora_jax.files.naming import Entry, Naming
from lora_jax.models.decoder import expert_names
from lora_jax.models.decoder.expert_names import LayerNames
from lora_jax.models.weights.linear_entries import linear_entries

_LINEAR = {
    "self_attn.q_proj": "attention/query",
    "self_attn.k_proj": "attention/key",
    "self_attn.v_proj": "attention/value",
    "self_attn.qkv_proj": "attention/query_key_value",
    "self_attn.o_proj": "attention/output",
    "mlp.gate_proj": "mlp/gate",
    "mlp.up_proj": "mlp/up",
    "mlp.gate_up_proj": "mlp/gate_up",
    "mlp.down_proj": "mlp/down",
}
_NORMS = {
    "self_attn.q_norm": "attention/query_norm",
    "self_attn.k_norm": "attention/key_norm",
    "input_layernorm": "attention_norm",
}
#: With a norm before each part of a layer, and with one after it: the same name means another norm.
_BEFORE = {"post_attention_layernorm": "mlp_norm"}
_AFTER = {
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}


def _decoder_layers(
    path: str, stacked: bool, norms: Mapping[str, str], experts: LayerNames | None, module: str
) -> Iterator[Entry]:
    prefix = "model.layers.{n}"
    for torch, ours in _LINEAR.items():
        yield from linear_entries(f"{prefix}.{torch}", f"{path}/{ours}", stacked)
    axes = "d -> n d" if stacked else ""
    for torch, ours in {**_NORMS, **norms}.items():
        yield Entry(f"{prefix}.{torch}.weight", f"{path}/{ours}/scale", "", axes)
    yield Entry(f"{prefix}.self_attn.sinks", f"{path}/attention/sinks", "", axes)
    if experts is not None:
        yield from experts(f"{prefix}.{module}", f"{path}/mlp", stacked)


def _naming(
    norms: Mapping[str, str], experts: LayerNames | None = None, module: str = "mlp"
) -> Naming:
    """Return the names of all leaves, of layers stacked or not: a tree has only one sort."""
    layers = partial(_decoder_layers, norms=norms, experts=experts, module=module)
    return Naming(
        (
            Entry("model.embed_tokens.weight", "embedding/embedding", "embedding"),
            *layers("layer_{n}", stacked=False),
            *layers("layers", stacked=True),
            Entry("model.norm.weight", "norm/scale"),
            *linear_entries("lm_head", "head"),
        )
    )


#: Llama, Mistral, Qwen, Phi-3, SmolLM3, Granite and the first Gemma.
LLAMA = _naming(_BEFORE)
#: Gemma 2 and 3, and OLMo 2.
POST_NORMS = _naming(_AFTER)
GPT_OSS = _naming(_BEFORE, expert_names.of_gpt_oss)
EXPERT_PARAMETERS = _naming(_BEFORE, expert_names.of_parameters)
MIXTRAL_FILES = _naming(_BEFORE, expert_names.MIXTRAL, "block_sparse_moe")
QWEN_MOE_FILES = _naming(_BEFORE, expert_names.QWEN_MOE)


def of_experts(files: Naming, names: Collection[str] = ()) -> Naming:
    """Return the naming of an adapter with these tensor names, see `expert_names`.

    Args:
      files: the naming of the model's own files.
      names: of the adapter, if there is one.
    """
    return files if expert_names.has_modules(names) else EXPERT_PARAMETERS


def _of_text(text: str, head: str) -> Naming:
    """Return the names of Gemma 3 with images: the part that reads text has a prefix."""
    rename = lambda name: name.replace("model.", text, 1).replace("lm_head", head)
    return Naming(
        tuple(dataclasses.replace(e, torch=rename(str(e.torch))) for e in POST_NORMS.entries)
    )


#: The modules of Gemma 3 with images.
OF_GEMMA3 = _of_text("model.language_model.", "lm_head")


def of_gemma3_files(names: Collection[str] = ()) -> Naming:
    """Return the names in its files, which are of older modules but in the newest ones."""
    if any(name.startswith("model.language_model.") for name in names):
        return OF_GEMMA3
    old = "language_model.lm_head"
    return _of_text("language_model.model.", old if f"{old}.weight" in names else "lm_head")
