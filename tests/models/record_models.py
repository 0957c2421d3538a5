"""Record tiny random models of `transformers` with their logits: tests/models/fixtures.

Run it in an environment with PyTorch and transformers (recorded with 2.13 and 5.23, the families
of `newer` with 5.24): `python tests/models/record_models.py [name ...]`. Every directory contains
what `save_pretrained` writes, and `expected.npz`: token ids and mask (one row padded on the left),
logits in float32, those of PyTorch in bfloat16, and what greedy generation appends to the first
row.
"""

import json
import pathlib
import shutil
import sys

import numpy as np
import torch
import transformers

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


def causal(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """Create a causal language model with random values also in its biases and norms."""
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(config, **eager)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("bias"):  # those of experts have two axes
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def models() -> dict[str, tuple[transformers.PreTrainedModel, str]]:
    """Return {name: (model, shard size)}."""
    c = transformers
    llama = c.LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=False)
    tied = c.LlamaConfig(
        **SIZES, rope_parameters=LINEAR, tie_word_embeddings=True, attention_bias=True,
        mlp_bias=True, head_dim=12,
    )  # fmt: skip
    mistral = c.MistralConfig(**SIZES, sliding_window=4, tie_word_embeddings=False)
    qwen2 = c.Qwen2Config(**SIZES, tie_word_embeddings=True, use_sliding_window=False)
    return {
        "llama": (causal(llama), "1GB"),
        "llama_tied": (causal(tied), "30KB"),
        "mistral": (causal(mistral), "1GB"),
        "qwen2": (causal(qwen2), "1GB"),
    }


YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.25],
    "long_factor": [1.5, 4.0],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}


def with_images(text: dict[str, object]) -> transformers.PreTrainedModel:
    """Create a Gemma 3 that also reads images, with values in its norms."""
    sizes = text | {"num_hidden_layers": 2, "sliding_window": 4, "query_pre_attn_scalar": 6}
    sizes |= {"layer_types": ["sliding_attention", "full_attention"]}
    images = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    images |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4, "vision_use_head": False}
    tokens = {"image_token_index": 63, "boi_token_index": 61, "eoi_token_index": 62}
    config = transformers.Gemma3Config(
        text_config=sizes, vision_config=images, mm_tokens_per_image=4, **tokens
    )
    config._attn_implementation = "eager"
    model = transformers.Gemma3ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("bias"):  # those of experts have two axes
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def newer() -> dict[str, tuple[transformers.PreTrainedModel, str]]:
    """Return the families with switches of their own, of fewer numbers."""
    c = transformers
    small = SIZES | {"hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
    small |= {"max_position_embeddings": 64}
    four = small | {"num_hidden_layers": 4}
    local = {"rope_type": "default", "rope_theta": 50.0}
    linear = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0}
    found = {
        "qwen3": causal(c.Qwen3Config(**small, rope_parameters=YARN, tie_word_embeddings=False)),
        "gemma": causal(c.GemmaConfig(**small)),
        "gemma2": causal(
            c.Gemma2Config(
                **four,
                sliding_window=4,
                query_pre_attn_scalar=6,
                attn_logit_softcapping=2.0,
                final_logit_softcapping=3.0,
            )
        ),
        "gemma3_text": causal(
            c.Gemma3TextConfig(
                **four,
                sliding_window=4,
                layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 1
                + ["sliding_attention"],
                query_pre_attn_scalar=6,
                rope_parameters={"full_attention": linear, "sliding_attention": local},
            )
        ),
        "gemma3": with_images(small),
        "phi3": causal(
            c.Phi3Config(
                **{k: v for k, v in small.items() if k != "head_dim"} | {"hidden_size": 32},
                rope_parameters=LONG,
                original_max_position_embeddings=8,
                sliding_window=9,
            )
        ),
        "smollm3": causal(
            c.SmolLM3Config(
                **four | {"num_hidden_layers": 3},
                no_rope_layers=[1, 0, 1],
                rope_parameters=DYNAMIC,
            )
        ),
        "olmo2": causal(c.Olmo2Config(**small)),
        "granite": causal(
            c.GraniteConfig(
                **small,
                embedding_multiplier=3.0,
                logits_scaling=2.0,
                residual_multiplier=0.5,
                attention_multiplier=0.3,
            )
        ),
    }
    return {name: (model, "1GB") for name, model in found.items()}


def experts() -> dict[str, tuple[transformers.PreTrainedModel, str]]:
    """Return the families whose layers have experts; three of them, so that one is often idle."""
    c = transformers
    small = SIZES | {"hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
    four = {"num_local_experts": 4, "num_experts_per_tok": 2}
    found = {
        "mixtral": causal(c.MixtralConfig(**small, **four, tie_word_embeddings=False)),
        "qwen3_moe": causal(
            c.Qwen3MoeConfig(
                **small,
                **{"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 12},
                norm_topk_prob=True,
            )
        ),
        "gpt_oss": causal(
            c.GptOssConfig(
                **small | {"head_dim": 8, "num_hidden_layers": 3},
                **four,
                sliding_window=4,
                swiglu_limit=0.5,
                rope_parameters=YARN | {"truncate": False},
            )
        ),
    }
    return {name: (model, "1GB") for name, model in found.items()}


def rows() -> dict[str, tuple[transformers.PreTrainedModel, str]]:
    """Return families that need no switch that others do not have."""
    c = transformers
    small = SIZES | {"hidden_size": 16, "intermediate_size": 24}
    local = {"rope_type": "default", "rope_theta": 50.0}
    found = {
        "ministral": c.MinistralConfig(
            **small,
            head_dim=8,
            sliding_window=4,
            layer_types=["full_attention", "sliding_attention"],
        ),
        "seed_oss": c.SeedOssConfig(**small, head_dim=8, attention_out_bias=True, mlp_bias=True),
        "olmo3": c.Olmo3Config(
            **small | {"num_hidden_layers": 4},
            sliding_window=4,
            rope_parameters={"full_attention": dict(YARN), "sliding_attention": local},
        ),
        "exaone4": c.Exaone4Config(
            **small, sliding_window=4, sliding_window_pattern=2, rope_parameters=dict(local)
        ),
        "olmoe": c.OlmoeConfig(**small, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True),
    }
    return {name: (causal(config), "1GB") for name, config in found.items()}


def mixed() -> dict[str, tuple[transformers.PreTrainedModel, str]]:
    """Return a family some of whose layers have no experts."""
    small = SIZES | {"hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
    config = transformers.Qwen3MoeConfig(
        **small | {"num_hidden_layers": 4},
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
        mlp_only_layers=[3],
        decoder_sparse_step=2,
        use_sliding_window=True,
        sliding_window=4,
    )
    return {"qwen3_moe_mixed": (causal(config), "1GB")}


def record_router_losses() -> None:
    """Record mean cross-entropy plus half the routers' loss, and the gradient of one router."""
    found = {}
    for name in ("mixtral", "qwen3_moe", "gpt_oss", "olmoe", "qwen3_moe_mixed"):
        model = transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / name).eval()
        with np.load(FIXTURES / name / "expected.npz") as file:
            ids, mask = (torch.from_numpy(file[key]) for key in ("ids", "mask"))
        read = {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1]}
        read["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, :-1]
        out = model(**read, output_router_logits=True)
        losses = torch.nn.functional.cross_entropy(
            out.logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        weights = (mask[:, 1:] * mask[:, :-1]).flatten()  # not from padding
        loss = (losses * weights).sum() / weights.sum() + 0.5 * out.aux_loss
        loss.backward()
        gates = {
            k: x
            for k, x in model.named_parameters()
            if k.endswith(("gate.weight", "router.weight"))
        }
        layer, gate = min(gates.items())
        found[name] = {
            "routers": float(out.aux_loss),
            "loss": float(loss),
            "layer": int(layer.split(".")[2]),
            "gradient": gate.grad.norm().item(),
        }
    (FIXTURES / "router_losses.json").write_text(json.dumps(found, indent=1) + "\n")


def record(name: str, model: transformers.PreTrainedModel, shard: str) -> None:
    directory = FIXTURES / name
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory, max_shard_size=shard)
    (directory / "generation_config.json").unlink(missing_ok=True)
    ids = torch.randint(1, 61 if name == "gemma3" else 64, (2, 11))  # not the tokens of images
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        greedy = model.generate(ids[:1], max_new_tokens=9, do_sample=False)[:, ids.shape[1] :]
        logits = model(**inputs).logits
        half = model.to(torch.bfloat16)(**inputs).logits.float()
    np.savez_compressed(
        directory / "expected.npz",
        **{"ids": ids, "mask": mask, "logits": logits, "bfloat16": half, "greedy": greedy},
    )


def record_bert() -> None:
    sizes = {name: SIZES[name] for name in SIZES if "token" not in name and "key_value" not in name}
    config = transformers.BertConfig(**sizes, hidden_act="gelu")
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    directory = FIXTURES / "bert"
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    ids = torch.randint(1, 64, (2, 11))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    types = torch.randint(0, 2, (2, 11))
    with torch.no_grad():
        hidden = model(ids, attention_mask=mask, token_type_ids=types).last_hidden_state
    arrays = {"ids": ids, "mask": mask, "types": types, "hidden": hidden}
    np.savez_compressed(directory / "expected.npz", **arrays)


if __name__ == "__main__":
    names = sys.argv[1:]
    for group in (models, newer, experts, mixed, rows):
        torch.manual_seed(0)
        for name, (model, shard) in group().items():
            if not names or name in names:
                record(name, model, shard)
    if not names or "bert" in names:
        record_bert()
    if not names or "router_losses" in names:
        record_router_losses()
