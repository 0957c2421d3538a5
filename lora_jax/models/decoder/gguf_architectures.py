"""llama.cpp's architectures: a table of how each one's files differ from transformers'.

It inverts llama.cpp's convert_hf_to_gguf.py.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_jax.core.errors import ModelFileError
from lora_jax.core.foreign import shown_value
from lora_jax.files.disk.gguf_file import GgufTensor
from lora_jax.models.decoder import gguf_experts
from lora_jax.models.decoder.gguf_experts import Rows, no_rows
from lora_jax.models.decoder.layer_choice import FULL, SLIDING

Known = Mapping[str, Any]  # metadata under its keys after the architecture
Tensors = Mapping[str, GgufTensor]

#: Hugging Face's modules -> llama.cpp's, where an architecture has no others.
_MODULES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_POST_NORMS = {
    **_MODULES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_SPLIT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_FUSED = {
    **{name: x for name, x in _MODULES.items() if not name.endswith(_SPLIT)},
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
}
_GPT_OSS = {**_MODULES, "post_attention_layernorm": "post_attention_norm"}
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp.

    Attributes:
      model_type: in config.json.
      modules: Hugging Face's modules -> llama.cpp's.
      interleaved: whether llama.cpp rotates the pairs (0, 1), (2, 3), ... of a head, where Hugging
        Face pairs its two halves; then rows of q and k have another order.
      one_added: whether the parameters of norms have one added in the file.
      settings: further settings under config.json's names.
      rows: of a naming in llama.cpp's names, for leaves that it keeps otherwise.
    """

    model_type: str
    modules: Mapping[str, str] = field(default_factory=lambda: _MODULES)
    interleaved: bool = False
    one_added: bool = False
    settings: Callable[[Known, Tensors], dict[str, Any]] = lambda known, tensors: {}
    rows: Rows = no_rows


def _llama(known: Known, tensors: Tensors) -> dict[str, Any]:
    return {
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
    }


def _experts(known: Known) -> dict[str, Any]:
    """Return how many experts there are, and how many compute a token."""
    if missing := [x for x in ("expert_count", "expert_used_count") if not known.get(x)]:
        raise ModelFileError(f"it lacks {', '.join(missing)}, the numbers of its experts")
    return {
        "num_local_experts": known["expert_count"],
        "num_experts_per_tok": known["expert_used_count"],
    }


def _mixtral(known: Known, tensors: Tensors) -> dict[str, Any]:
    return _experts(known) | {"sliding_window": known.get("attention.sliding_window") or None}


def _qwen3_moe(known: Known, tensors: Tensors) -> dict[str, Any]:
    width = known.get("expert_feed_forward_length", known["feed_forward_length"])
    # llama.cpp always divides the shares of the chosen experts by their sum
    return _experts(known) | {"moe_intermediate_size": width, "norm_topk_prob": True}


def _gpt_oss(known: Known, tensors: Tensors) -> dict[str, Any]:
    width = known.get("expert_feed_forward_length", known["feed_forward_length"])
    found: dict[str, Any] = {
        "intermediate_size": width,
        "sliding_window": known.get("attention.sliding_window", 128),
    }
    if known.get("rope.scaling.type", "none") == "none":
        found["rope_scaling"] = {"rope_type": "default"}  # config.json's is another one
    if known.get("rope.scaling.type") == "yarn":
        original = known.get("rope.scaling.original_context_length", 4096)
        found["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": known.get("rope.scaling.factor", 1.0),
            "original_max_position_embeddings": original,
            "truncate": False,
        }
    return _experts(known) | found


def _gemma(known: Known, tensors: Tensors) -> dict[str, Any]:
    return {"hidden_act": "gelu_pytorch_tanh"}


def _gemma2(known: Known, tensors: Tensors) -> dict[str, Any]:
    return _windows(known, 46, every=2) | {
        "attn_logit_softcapping": known.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": known.get("final_logit_softcapping", 30.0),
    }


def _gemma3(known: Known, tensors: Tensors) -> dict[str, Any]:
    return _windows(known, 62, every=6) | {
        "rope_theta": known.get("rope.freq_base", 1e6),
        "rope_local_base_freq": known.get("rope.freq_base_swa", 1e4),
        "final_logit_softcapping": known.get("final_logit_softcapping"),
    }


def _windows(known: Known, layers_of_largest: int, every: int) -> dict[str, Any]:
    """Return what Gemma 2 and 3 share.

    A file does not say `query_pre_attn_scalar`: it is the size of a head, but for the largest
    model, which llama.cpp too tells by the number of its layers.
    """
    layers, heads = known["block_count"], known["attention.head_count"]
    width = known["embedding_length"]
    head = known.get("attention.key_length", width // heads)
    is_largest = layers == layers_of_largest
    found = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": width // heads if is_largest else head,
        "sliding_window": known.get("attention.sliding_window", 4096) or None,
    }
    pattern = known.get("attention.sliding_window_pattern", every)
    if isinstance(pattern, np.ndarray | list):
        types = [SLIDING if local else FULL for local in pattern]
        return found | {"layer_types": types}
    return found | {"sliding_window_pattern": int(pattern)}


def _phi3(known: Known, tensors: Tensors) -> dict[str, Any]:
    size = known["embedding_length"] // known["attention.head_count"]
    found: dict[str, Any] = {
        "sliding_window": known.get("attention.sliding_window") or None,
        "partial_rotary_factor": known.get("rope.dimension_count", size) / size,
    }
    original = known.get("rope.scaling.original_context_length")
    if original is not None:
        found["original_max_position_embeddings"] = original
    if LONG not in tensors and SHORT not in tensors:
        return found
    if LONG not in tensors or SHORT not in tensors or original is None:
        raise ModelFileError(
            f"it needs {LONG}, {SHORT} and rope.scaling.original_context_length together"
        )
    factors = {
        "long_factor": _as_list(tensors[LONG]),
        "short_factor": _as_list(tensors[SHORT]),
    }
    scaling: dict[str, Any] = {"rope_type": "longrope", **factors}
    attention, ratio = known.get("rope.scaling.attn_factor"), 0.0
    if original > 1:
        ratio = max(known.get("context_length", original) / original, 1.0)
        ratio = math.sqrt(1 + math.log(ratio) / math.log(original))
    if attention is not None and abs(attention - ratio) > 1e-5:
        scaling["attention_factor"] = attention  # not what follows from the lengths
    return found | {"rope_scaling": scaling}


def _as_list(tensor: GgufTensor) -> list[float]:
    if len(tensor.shape) != 1:
        raise ModelFileError(f"{tensor.name} must be a vector, its shape is {tensor.shape}")
    return [shortened(float(x)) for x in np.asarray(tensor)]


def shortened(value: Any) -> Any:
    """Return a float as it was before it became a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


#: `general.architecture` -> what is known of it. llama.cpp calls Mistral "llama" too.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", interleaved=True, settings=_llama),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", one_added=True, settings=_gemma),
    "gemma2": Architecture("gemma2", _POST_NORMS, one_added=True, settings=_gemma2),
    "gemma3": Architecture("gemma3_text", _POST_NORMS, one_added=True, settings=_gemma3),
    "phi3": Architecture("phi3", _FUSED, settings=_phi3),
    "qwen3moe": Architecture("qwen3_moe", settings=_qwen3_moe, rows=gguf_experts.SEPARATE),
    "gpt-oss": Architecture("gpt_oss", _GPT_OSS, settings=_gpt_oss, rows=gguf_experts.GPT_OSS),
}
#: Those that have another row where a file has experts.
_WITH_EXPERTS = {
    "llama": Architecture(
        "mixtral", interleaved=True, settings=_mixtral, rows=gguf_experts.SEPARATE
    )
}
#: The `model_type`s of models with experts.
WITH_EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")
#: `model_type` in config.json -> llama.cpp's architecture.
ARCHITECTURE_OF = {row.model_type: name for name, row in ARCHITECTURES.items()}
ARCHITECTURE_OF |= {"mistral": "llama", "mixtral": "llama"}


def architecture(name: Any, experts: bool = False) -> Architecture:
    """Return the row of a file's `general.architecture`, with experts or not.

    Raises:
      ModelFileError: there is none.
    """
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ModelFileError(
            f"the architecture {shown_value(name)} is not supported, only "
            f"{', '.join(ARCHITECTURES)}"
        )
    row = ARCHITECTURES[name]
    if not experts:
        return row
    if row.rows is no_rows and name not in _WITH_EXPERTS:
        raise ModelFileError(f"mixtures of experts are not supported for {name}")
    return _WITH_EXPERTS.get(name, row)
