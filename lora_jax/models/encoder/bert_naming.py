"""Which tensor of a Hugging Face file is which leaf of `Bert`."""

from collections.abc import Collection, Iterator

from lora_jax.files.naming import Entry, Naming
from lora_jax.models.weights.linear_entries import LAYERS, linear_entries

_LINEAR = {
    **{f"attention.self.{x}": f"attention/{x}" for x in ("query", "key", "value")},
    "attention.output.dense": "attention/output",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
}


def _bert_naming(scale: str, bias: str) -> Naming:
    """Return BERT's naming; old files call the scale and bias of a norm gamma and beta."""

    def norm(torch: str, path: str, stacked: bool = False) -> Iterator[Entry]:
        axes = "d -> n d" if stacked else ""
        yield Entry(f"{torch}.LayerNorm.{scale}", f"{path}/scale", "", axes)
        yield Entry(f"{torch}.LayerNorm.{bias}", f"{path}/bias", "", axes)

    def layers(path: str, stacked: bool) -> Iterator[Entry]:
        prefix = "encoder.layer.{n}"
        for torch, ours in _LINEAR.items():
            yield from linear_entries(f"{prefix}.{torch}", f"{path}/{ours}", stacked)
        yield from norm(f"{prefix}.attention.output", f"{path}/attention_norm", stacked)
        yield from norm(f"{prefix}.output", f"{path}/output_norm", stacked)

    return Naming(
        (
            *(
                Entry(f"embeddings.{x}_embeddings.weight", f"embeddings/{y}/embedding", "embedding")
                for x, y in {"word": "word", "position": "position", "token_type": "type"}.items()
            ),
            *norm("embeddings", "embeddings/norm"),
            *(entry for place in LAYERS.items() for entry in layers(*place)),
        )
    )


BERT = _bert_naming("weight", "bias")
_OLD_BERT = _bert_naming("gamma", "beta")


def naming(names: Collection[str] = (), prefix: str = "bert.") -> Naming:
    """Return BERT's naming.

    Args:
      names: the tensor names in a file, if there is one: they may have the prefix, or the old
        names of norms.
      prefix: of the names in the file of a model with a head.
    """
    table = _OLD_BERT if any(name.endswith("LayerNorm.gamma") for name in names) else BERT
    return table.with_prefix(prefix) if any(n.startswith(prefix) for n in names) else table
