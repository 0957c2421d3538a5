"""Tiny models of each family, as their config.json says, and adapters of all linear layers."""

import numpy as np

WIDTH, HIDDEN, HEADS, GROUPS, SIZE, VOCABULARY = 8, 12, 2, 1, 4, 16
_OF = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "phi3": "Phi3",
    "smollm3": "SmolLM3",
    "olmo2": "Olmo2",
    "granite": "Granite",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3Moe",
}
FAMILIES = list(_OF)
_LINEAR = {
    "self_attn.q_proj": (WIDTH, HEADS * SIZE),
    "self_attn.k_proj": (WIDTH, GROUPS * SIZE),
    "self_attn.v_proj": (WIDTH, GROUPS * SIZE),
    "self_attn.o_proj": (HEADS * SIZE, WIDTH),
    "mlp.gate_proj": (WIDTH, HIDDEN),
    "mlp.up_proj": (WIDTH, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDTH),
}
_FUSED = {  # of Phi-3
    "self_attn.qkv_proj": (WIDTH, (HEADS + 2 * GROUPS) * SIZE),
    "mlp.gate_up_proj": (WIDTH, 2 * HIDDEN),
    **{name: _LINEAR[name] for name in ("self_attn.o_proj", "mlp.down_proj")},
}
EXPERTS = 2
#: The part of a layer, the router, and the modules of each expert: gate, up, down.
_EXPERTS = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
#: The leaf of each module in a layer of ours.
LEAVES = {
    "self_attn.q_proj": ("attention", "query"),
    "self_attn.k_proj": ("attention", "key"),
    "self_attn.v_proj": ("attention", "value"),
    "self_attn.qkv_proj": ("attention", "query_key_value"),
    "self_attn.o_proj": ("attention", "output"),
    "mlp.gate_proj": ("mlp", "gate"),
    "mlp.up_proj": ("mlp", "up"),
    "mlp.gate_up_proj": ("mlp", "gate_up"),
    "mlp.down_proj": ("mlp", "down"),
}


def linear(family):
    """Return {module: (inputs, outputs)} of a layer."""
    if family not in _EXPERTS:
        return _FUSED if family == "phi3" else _LINEAR
    part, names = _EXPERTS[family]
    found = {name: shape for name, shape in _LINEAR.items() if name.startswith("self")}
    found[f"{part}.gate"] = (WIDTH, EXPERTS)
    for expert in range(EXPERTS):
        for name, ours in zip(names, ("gate", "up", "down"), strict=True):
            found[f"{part}.experts.{expert}.{name}"] = _LINEAR[f"mlp.{ours}_proj"]
    return found


def leaves(family):
    """Return {path in a layer of ours: shape}."""
    found = {}
    for module, shape in linear(family).items():
        if module in LEAVES:
            found[LEAVES[module]] = shape
        elif module.endswith(".gate"):
            found["mlp", "router"] = shape
        elif ".experts.0." in module:
            ours = ("gate", "up", "down")[_EXPERTS[family][1].index(module.rpartition(".")[2])]
            found["mlp", "experts", ours] = (EXPERTS, *shape)
    return found


def config(family):
    """Return the values of config.json."""
    values = {"model_type": family, "architectures": [f"{_OF[family]}ForCausalLM"]}
    values |= {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": 1}
    values |= {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": SIZE}
    values |= {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "rms_norm_eps": 1e-6}
    values |= {"rope_theta": 10000.0, "sliding_window": 32, "hidden_act": "silu"}
    values |= {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
    values |= {"query_pre_attn_scalar": SIZE, "original_max_position_embeddings": 64}
    values |= {"attention_multiplier": 0.5, "embedding_multiplier": 1.0}
    values |= {"num_local_experts": EXPERTS, "num_experts": EXPERTS, "num_experts_per_tok": 1}
    values |= {"moe_intermediate_size": HIDDEN, "decoder_sparse_step": 1}
    return values | {"residual_multiplier": 1.0, "logits_scaling": 1.0, "no_rope_layers": [1]}


def adapter(family):
    """Return the tensors and the config of a PEFT adapter of layer 0."""
    rng, tensors = np.random.default_rng(3), {}
    for module, (inputs, outputs) in linear(family).items():
        name = f"base_model.model.model.layers.0.{module}"
        tensors[f"{name}.lora_A.weight"] = rng.normal(size=(1, inputs)).astype("f4")
        tensors[f"{name}.lora_B.weight"] = rng.normal(size=(outputs, 1)).astype("f4")
    ends = sorted({module.rpartition(".")[2] for module in linear(family)})
    values = {"peft_type": "LORA", "r": 1, "lora_alpha": 2.0, "target_modules": ends}
    return tensors, values | {"bias": "none"}
