"""Adapters of the tiny model, the same numbers each time, under Hugging Face's names."""

import numpy as np

from tests.parity.llama_cpp.tiny_model import GROUPS, HEADS, HIDDEN, SIZE, VOCABULARY, WIDTH

Q, K = HEADS * SIZE, GROUPS * SIZE
#: module: (rank, alpha over rank, inputs, outputs)
MODULES = {
    "model.embed_tokens": (3, 2.0, VOCABULARY, WIDTH),
    "model.layers.0.self_attn.q_proj": (3, 2.0, WIDTH, Q),
    "model.layers.0.self_attn.k_proj": (3, 2.0, WIDTH, K),
    "model.layers.0.self_attn.v_proj": (2, 0.5, WIDTH, K),
    "model.layers.0.mlp.down_proj": (3, 2.0, HIDDEN, WIDTH),
    "model.layers.1.self_attn.k_proj": (1, 6.0, WIDTH, K),
    "model.layers.1.self_attn.o_proj": (3, 2.0, Q, WIDTH),
    "model.layers.1.mlp.gate_proj": (3, 2.0, WIDTH, HIDDEN),
    "lm_head": (3, 2.0, WIDTH, VOCABULARY),
}
#: case: architecture, whether the head is tied, the modules that are left out
CASES = {
    "llama": ("llama", False, ()),
    "qwen2 tied": ("qwen2", True, ("model.embed_tokens", "lm_head")),
}


def factors(case):
    """Return {module: (A [rank, in], B [out, rank], scale)} of a case, float32."""
    rng, made = np.random.default_rng(7), {}
    for module, (rank, scale, inputs, outputs) in MODULES.items():
        a, b = (rng.standard_normal(shape) for shape in ((rank, inputs), (outputs, rank)))
        if module not in CASES[case][2]:
            made[module] = (0.2 * a).astype("f4"), (0.3 * b).astype("f4"), scale
    return made
