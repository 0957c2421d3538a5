"""Adapters both ways between lora_jax.models and transformers with peft: equal logits.

    python -m tests.peft.check_models

needs torch, peft 0.21.2 and transformers. Tiny random Llamas (head tied or not), a Qwen2 and a
BERT. Adapters that peft makes are read onto the Flax models, layers scanned or not; adapters made
here are loaded by peft, which must not warn.
"""

import pathlib
import tempfile
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft as hugging_face
import torch
import transformers

import lora_jax
from lora_jax import models, peft
from tests.peft import check_files
from tests.peft.record_files import move

TOLERANCE = 1e-4
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA = {**SIZES, "num_key_value_heads": 2}
CONFIGS = {
    "llama": transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "llama tied": transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True, attention_bias=True),
    "qwen2": transformers.Qwen2Config(**LLAMA, tie_word_embeddings=True),
    "bert": transformers.BertConfig(**SIZES),
}
LINEAR = ["q_proj", "v_proj", "down_proj"]
PEFTS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": LINEAR, "rank_pattern": {"layers.1.self_attn.q_proj": 2}},
    "dora": {"target_modules": LINEAR, "use_dora": True, "use_rslora": True},
    "all-linear": {"target_modules": "all-linear", "layers_to_transform": None},
    "norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "tied whole": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 17, 5]},
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
}
BERTS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["query", "value"], "bias": "lora_only"},
    "dense": {"target_modules": ["dense"], "exclude_modules": ["pooler.dense"], "use_dora": True},
    "embedding": {"target_modules": ["word_embeddings", "key"]},
}
OURS = {
    "linear": lora_jax.LoraConfig(rank=3, alpha=4, targets=["query/kernel", "value/kernel"]),
    "all-linear": lora_jax.LoraConfig(rank=3, alpha=6, scaling="rslora"),
    "dora": lora_jax.LoraConfig(rank=3, dora=True, targets=["query/kernel"]),
    "layers": lora_jax.LoraConfig(rank=3, targets=["query/kernel"], layers=[0, 2]),
    "rows": lora_jax.LoraConfig(rank=3, targets=["query/kernel"], rows={"embedding": [3, 5]}),
    "norms": lora_jax.LoraConfig(rank=3, targets=["query/kernel"], train=["norm/scale"]),
}
IDS = np.array([[3, 17, 5, 9, 11, 63, 1], [2, 5, 5, 3, 40, 41, 42]])


def torch_model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = CONFIGS[name]
    bert = name == "bert"
    model = transformers.BertModel(config) if bert else None
    model = model or transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.05 * torch.randn(x.shape))
    return model.eval()


def logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        out = model(torch.from_numpy(IDS))
    return (out.last_hidden_state if "last_hidden_state" in out else out.logits).numpy()


def apply(pretrained: models.Pretrained, params: Any) -> np.ndarray:
    arguments = (jnp.asarray(IDS), jnp.ones(IDS.shape, jnp.int32))
    return np.asarray(jax.jit(lora_jax.lora(pretrained.apply))(params, *arguments))


def report(what: str, got: np.ndarray, want: np.ndarray, plain: np.ndarray) -> float:
    apart, moved = np.abs(got - want).max(), np.abs(want - plain).max()
    print(f"{apart:.1e}  (adapters move by {moved:.1e})  {what}", flush=True)
    assert apart < TOLERANCE < moved, what
    return float(apart)


def theirs(name: str, fields: dict[str, Any], loaded: list[models.Pretrained]) -> float:
    """An adapter of peft's, read here."""
    config = hugging_face.LoraConfig(**{"r": 4, "lora_alpha": 6, **fields})
    model = move(hugging_face.get_peft_model(torch_model(name), config)).eval()
    want, worst = logits(model), 0.0
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for pretrained in loaded:
            adapters = peft.load(folder, pretrained.params, pretrained.naming)
            got = apply(pretrained, lora_jax.join(pretrained.params, adapters))
            worst = max(worst, report(f"peft -> {name}", got, want, logits(torch_model(name))))
    return worst


def ours(name: str, config: lora_jax.LoraConfig, pretrained: models.Pretrained) -> float:
    """An adapter made here, loaded by peft."""
    arguments = (jnp.asarray(IDS), jnp.ones(IDS.shape, jnp.int32))
    params = lora_jax.init(
        jax.random.key(0), pretrained.params, config, pretrained.apply, *arguments
    )
    base, adapters = lora_jax.split(params)
    adapters = check_files.moved(adapters)
    with tempfile.TemporaryDirectory() as folder:
        peft.save(folder, adapters, pretrained.naming, base=base, config=config)
        model = check_files.loaded(torch_model(name), folder)
        want = logits(model)
    got = apply(pretrained, lora_jax.join(base, adapters))
    return report(f"{name} -> peft", got, want, logits(torch_model(name)))


def main() -> None:
    warnings.simplefilter("error")
    for harmless in (".*is_gradient_checkpointing", ".*save_embedding_layers"):
        warnings.filterwarnings("ignore", harmless)
    worst, counts = 0.0, [0, 0]
    for name in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            torch_model(name).save_pretrained(folder)
            scans = (False,) if name == "bert" else (False, True)
            loaded = [models.load(pathlib.Path(folder), scan=scan) for scan in scans]
        for case, fields in (BERTS if name == "bert" else PEFTS).items():
            is_tied = CONFIGS[name].tie_word_embeddings and name != "bert"
            if ("tied" in case and not is_tied) or (case == "embedding" and is_tied):
                continue
            print(case, end=": ")
            worst = max(worst, theirs(name, fields, loaded))
            counts[0] += 1
        for case, config in OURS.items():
            for pretrained in loaded:
                print(case, end=": ")
                try:
                    worst = max(worst, ours(name, config, pretrained))
                except lora_jax.TargetError as error:
                    print("skipped:", str(error).splitlines()[0])
                    continue
                counts[1] += 1
    print(f"{counts[0]} adapters of peft read, {counts[1]} written: {worst:.1e} apart at most")


if __name__ == "__main__":
    main()
