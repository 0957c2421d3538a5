"""Which tensor of a Hugging Face file is which leaf of `ModernBert`."""

from collections.abc import Collection, Iterator

from lora_jax.files.naming import Entry, Naming
from lora_jax.models.weights.linear_entries import linear_entries

PREFIX = "model."  # of the names in the file of a model with a head


def _norm(torch: str, path: str) -> Iterator[Entry]:
    yield Entry(f"{torch}.weight", f"{path}/scale")
    yield Entry(f"{torch}.bias", f"{path}/bias")


def _several(torch: str, path: str, parts: int) -> Iterator[Entry]:
    """Yield a linear layer that makes several things, here along a separate axis."""
    sizes = {"parts": parts}
    yield Entry(f"{torch}.weight", f"{path}/kernel", "linear", "(parts o) i -> i parts o", sizes)
    yield Entry(f"{torch}.bias", f"{path}/bias", "", "(parts o) -> parts o", sizes)


_LAYER, _OURS = "layers.{n}", "layer_{n}"
MODERNBERT = Naming(
    (
        Entry("embeddings.tok_embeddings.weight", "embeddings/word/embedding", "embedding"),
        *_norm("embeddings.norm", "embeddings/norm"),
        *_norm(f"{_LAYER}.attn_norm", f"{_OURS}/attention_norm"),
        *_several(f"{_LAYER}.attn.Wqkv", f"{_OURS}/attention/qkv", 3),
        *linear_entries(f"{_LAYER}.attn.Wo", f"{_OURS}/attention/output"),
        *_norm(f"{_LAYER}.mlp_norm", f"{_OURS}/mlp_norm"),
        *_several(f"{_LAYER}.mlp.Wi", f"{_OURS}/mlp/input", 2),
        *linear_entries(f"{_LAYER}.mlp.Wo", f"{_OURS}/mlp/output"),
        *_norm("final_norm", "norm"),
    )
)


def naming(names: Collection[str] = ()) -> Naming:
    """Return ModernBERT's naming; `names` are the tensors in a file, if there is one."""
    is_whole = any(name.startswith(PREFIX) for name in names)
    return MODERNBERT.with_prefix(PREFIX) if is_whole else MODERNBERT
