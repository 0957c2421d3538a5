"""A tiny Llama or Qwen2 in a GGUF file, the same numbers each time; made without lora_jax."""

import numpy as np
from gguf import GGUFWriter

HEADS, GROUPS, SIZE = 4, 2, 8  # heads of queries, of keys and values; numbers per head
WIDTH, HIDDEN, VOCABULARY, LAYERS = HEADS * SIZE, 48, 40, 2
IDS = [3, 17, 5, 5, 29, 39, 0, 11]
SHAPES = {
    "attn_norm": (WIDTH,),
    "ffn_norm": (WIDTH,),
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (GROUPS * SIZE, WIDTH),
    "attn_v": (GROUPS * SIZE, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (HIDDEN, WIDTH),
    "ffn_up": (HIDDEN, WIDTH),
    "ffn_down": (WIDTH, HIDDEN),
}
BIASES = {"attn_q": WIDTH, "attn_k": GROUPS * SIZE, "attn_v": GROUPS * SIZE}


def tensors(architecture, tied):
    """Return the weights by llama.cpp's names, as float32."""
    rng = np.random.default_rng(0)
    shapes = {"token_embd.weight": (VOCABULARY, WIDTH), "output_norm.weight": (WIDTH,)}
    if not tied:
        shapes["output.weight"] = (VOCABULARY, WIDTH)
    for n in range(LAYERS):
        shapes |= {f"blk.{n}.{name}.weight": shape for name, shape in SHAPES.items()}
        if architecture == "qwen2":
            shapes |= {f"blk.{n}.{name}.bias": (size,) for name, size in BIASES.items()}
    draw = lambda shape: rng.standard_normal(shape).astype(np.float32)
    norm = lambda name: 1.0 if "norm" in name else 0.0
    return {name: norm(name) + 0.2 * draw(shape) for name, shape in shapes.items()}


def write(path, architecture, tied=False):
    """Write the model as a GGUF file without a tokenizer."""
    writer = GGUFWriter(path, architecture)
    sizes = {"embedding_length": WIDTH, "feed_forward_length": HIDDEN, "block_count": LAYERS}
    sizes |= {"attention.head_count": HEADS, "attention.head_count_kv": GROUPS}
    for key, value in (sizes | {"context_length": 64, "vocab_size": VOCABULARY}).items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    for name, value in tensors(architecture, tied).items():
        writer.add_tensor(name, value.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
