"""Which tensor of a Hugging Face file is which leaf of `Bert`."""

from collections.abc import Collection, Iterator

from lora_jax.files.naming import Entry, Naming
from lora_jax.models.weights.linear_entries import linear_entries


def _bert_naming(scale: str, bias: str) -> Naming:
    """Return BERT's naming; old files call the scale and bias of a norm gamma and beta."""

    def norm(torch: str, path: str) -> Iterator[Entry]:
        yield Entry(f"{torch}.LayerNorm.{scale}", f"{path}/scale")
        yield Entry(f"{torch}.LayerNorm.{bias}", f"{path}/bias")

    prefix = "encoder.layer.{n}"
    return Naming(
        (
            *(
                Entry(f"embeddings.{x}_embeddings.weight", f"embeddings/{y}/embedding", "embedding")
                for x, y in {"word": "word", "position": "position", "token_type": "type"}.items()
            ),
            *norm("embeddings", "embeddings/norm"),
            *(
                entry
                for name in ("query", "key", "value")
                for entry in linear_entries(
                    f"{prefix}.attention.self.{name}", f"layer_{{n}}/attention/{name}"
                )
            ),
            *linear_entries(f"{prefix}.attention.output.dense", "layer_{n}/attention/output"),
            *norm(f"{prefix}.attention.output", "layer_{n}/attention_norm"),
            *linear_entries(f"{prefix}.intermediate.dense", "layer_{n}/intermediate"),
            *linear_entries(f"{prefix}.output.dense", "layer_{n}/output"),
            *norm(f"{prefix}.output", "layer_{n}/output_norm"),
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
