"""Which tensor of a Hugging Face file is which leaf of `ModernBert`."""

from collections.abc import Collection, Iterator

from lora_jax.files.naming import Entry, Naming
from lora_jax.models.weights.linear_entries import LAYERS, linear_entries, norm_entries

PREFIX = "model."  # of the names in the file of a model with a head


def _several(torch: str, path: str, stacked: bool, first: int, parts: int) -> Iterator[Entry]:
    """Yield a linear layer that makes several things, here along a separate axis."""
    n, sizes = "n " if stacked else "", {"parts": parts}
    axes = {"weight": f"(parts o) i -> {n}i parts o", "bias": f"(parts o) -> {n}parts o"}
    yield Entry(f"{torch}.weight", f"{path}/kernel", "linear", axes["weight"], sizes, first=first)
    yield Entry(f"{torch}.bias", f"{path}/bias", "", axes["bias"], sizes, first=first)


def _layers(path: str, stacked: bool) -> Iterator[Entry]:
    """Yield the entries of layers; the first layer, which differs, is never stacked."""
    torch, how = "layers.{n}", (stacked, int(stacked))
    yield from norm_entries(f"{torch}.attn_norm", f"{path}/attention_norm", *how)
    yield from _several(f"{torch}.attn.Wqkv", f"{path}/attention/qkv", *how, 3)
    yield from linear_entries(f"{torch}.attn.Wo", f"{path}/attention/output", *how)
    yield from norm_entries(f"{torch}.mlp_norm", f"{path}/mlp_norm", *how)
    yield from _several(f"{torch}.mlp.Wi", f"{path}/mlp/input", *how, 2)
    yield from linear_entries(f"{torch}.mlp.Wo", f"{path}/mlp/output", *how)


MODERNBERT = Naming(
    (
        Entry("embeddings.tok_embeddings.weight", "embeddings/word/embedding", "embedding"),
        *norm_entries("embeddings.norm", "embeddings/norm"),
        *(entry for place in LAYERS.items() for entry in _layers(*place)),
        *norm_entries("final_norm", "norm"),
    )
)


def naming(names: Collection[str] = ()) -> Naming:
    """Return ModernBERT's naming; `names` are the tensors in a file, if there is one."""
    is_whole = any(name.startswith(PREFIX) for name in names)
    return MODERNBERT.with_prefix(PREFIX) if is_whole else MODERNBERT
