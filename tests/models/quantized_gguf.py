"""A tiny Llama in a GGUF file whose tensors are quantized as one asks."""

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quant_shape_to_byte_shape, quantize

HEADS, GROUPS, SIZE = 4, 2, 64  # heads of queries, of keys and values; numbers per head
WIDTH, HIDDEN, VOCABULARY, LAYERS = HEADS * SIZE, 512, 96, 2

SHAPES = {
    "token_embd": (VOCABULARY, WIDTH),
    "output_norm": (WIDTH,),
    "output": (VOCABULARY, WIDTH),
} | {
    f"blk.{n}.{name}": shape
    for n in range(LAYERS)
    for name, shape in {
        "attn_norm": (WIDTH,),
        "ffn_norm": (WIDTH,),
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (GROUPS * SIZE, WIDTH),
        "attn_v": (GROUPS * SIZE, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_gate": (HIDDEN, WIDTH),
        "ffn_up": (HIDDEN, WIDTH),
        "ffn_down": (WIDTH, HIDDEN),
    }.items()
}


def numbers(kind, shape, rng):
    """Return small random numbers, stored; bytes of small scales where `gguf` cannot quantize."""
    values = (rng.standard_normal(shape) / 16).astype(np.float32)
    try:
        return quantize(values, kind)
    except NotImplementedError:
        rows = rng.integers(0, 256, quant_shape_to_byte_shape(shape, kind), np.uint8)
        halves = {"Q6_K": (208,), "Q2_K": (80, 82)}.get(kind.name, (0, 2))
        blocks = rows.reshape(-1, {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210, "Q2_K": 84}[kind.name])
        for start in halves:
            blocks[:, start : start + 2] = np.array([2e-4], np.float16).view(np.uint8)
        return rows


def write(path, kinds, tied=False):
    """Write the model.

    Args:
      path: of the file.
      kinds: GGUF's types by the end of a tensor's name, such as {"blk.0.attn_v": "Q6_K"}; the first
        that fits counts. Norms are F32.
      tied: whether there is no head.
    """
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    sizes = {"embedding_length": WIDTH, "feed_forward_length": HIDDEN, "block_count": LAYERS}
    sizes |= {"attention.head_count": HEADS, "attention.head_count_kv": GROUPS}
    for key, value in (sizes | {"context_length": 64}).items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for name, shape in SHAPES.items():
        if name == "output" and tied:
            continue
        found = "F32" if len(shape) == 1 else next(k for end, k in kinds.items() if end in name)
        kind = GGMLQuantizationType[found]
        writer.add_tensor(f"{name}.weight", numbers(kind, shape, rng), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
