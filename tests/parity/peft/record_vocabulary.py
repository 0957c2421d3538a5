"""Record adapters that peft 0.21.2 saves of models with a resized vocabulary.

    python -m tests.parity.peft.record_vocabulary

writes `vocabulary.npz`, adapters of a Llama of transformers whose vocabulary grew from 11 to 13:

    <case>/base/<name>                    tensors of the resized model, before training
    <case>/merged/<name>                  what merge_and_unload makes of the trained model
    <case>/adapter_model.safetensors      the two files that save_pretrained writes, as bytes
    <case>/adapter_config.json
"""

import pathlib
import tempfile
import warnings
from typing import Any

import numpy as np
import peft
import torch
import transformers

FILE = pathlib.Path(__file__).parent / "vocabulary.npz"
SMALL, LARGE = 11, 13
#: Whether the head is tied to the embedding, and the fields of the configuration.
CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "factors alone": (False, {}),
    "factors alone, tied": (True, {}),
    "embedding saved": (False, {"modules_to_save": ["embed_tokens"]}),
    "head saved": (False, {"modules_to_save": ["lm_head"]}),
    "both saved": (False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied and saved": (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "embedding adapted": (False, {"target_modules": ["q_proj", "embed_tokens"]}),
    "both adapted": (False, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "tied and adapted": (
        True,
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    ),
    "rows": (False, {"trainable_token_indices": {"embed_tokens": [11, 12]}}),
    "rows, tied": (True, {"trainable_token_indices": {"embed_tokens": [11, 12]}}),
    "rows of both": (
        False,
        {"trainable_token_indices": {"embed_tokens": [11, 12], "lm_head": [3]}},
    ),
}


def build(tied: bool) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=SMALL,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def record(tied: bool, fields: dict[str, Any]) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        # peft finds that the vocabulary grew by the configuration of the model that was saved
        build(tied).save_pretrained(f"{folder}/base")
        model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/base")
        model.resize_token_embeddings(LARGE, mean_resizing=False)
        found = shown(model, "base")
        config = peft.LoraConfig(
            **{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **fields}
        )
        adapted = peft.get_peft_model(model, config)
        with torch.no_grad():
            for x in adapted.parameters():
                if x.requires_grad:
                    x.add_(0.3 * torch.randn(x.shape))
        adapted.save_pretrained(f"{folder}/adapter")
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            data = (pathlib.Path(folder) / "adapter" / file).read_bytes()
            data = data.replace(f"{folder}/base".encode(), b"base") if "config" in file else data
            found[file] = np.frombuffer(data, np.uint8)
        if tied and "embed_tokens" in config.target_modules:
            return found | shown(merged_once(adapted), "merged")
        return found | shown(adapted.merge_and_unload(), "merged")


def merged_once(adapted: Any) -> Any:
    """Return the merged model; merge_and_unload adds the update to a tied weight twice."""
    embedding = adapted.get_base_model().get_input_embeddings()
    want = embedding.get_base_layer().weight.data + embedding.get_delta_weight("default")
    merged = adapted.merge_and_unload()
    merged.get_input_embeddings().weight.data.copy_(want)
    return merged


def shown(model: Any, kind: str) -> dict[str, np.ndarray]:
    """Return copies of the tensors that any case adapts or saves."""
    every = model.state_dict()
    names = [name for name in every if any(x in name for x in ("embed", "head", "q_proj"))]
    return {f"{kind}/{name}": np.array(every[name]) for name in names}


def main() -> None:
    warnings.simplefilter("ignore")  # of the saved embeddings, which are what is recorded
    saved: dict[str, np.ndarray] = {}
    for name, (tied, fields) in CASES.items():
        saved |= {f"{name}/{key}": x for key, x in record(tied, fields).items()}
    np.savez_compressed(FILE, **saved)
    print(f"{FILE.name}: {len(CASES)} cases, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
