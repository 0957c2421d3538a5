"""Embeddings that are the head too: one leaf here, two modules with equal tensors in PEFT.

PEFT adapts both only where the configuration says `ensure_weight_tying`; the head then has the
embedding's factors transposed. The naming has a row for the head, and the tree has no such leaf.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from lora_jax.files.naming.patterns import placeholders
from lora_jax.files.peft import tensor_names
from lora_jax.files.peft.config import PeftConfig
from lora_jax.files.torch_adapters.contents import Contents, TorchBase, module_of
from lora_jax.files.torch_adapters.factors import TorchFactors


@dataclasses.dataclass(frozen=True)
class Tied:
    """The torch names of the weights of an embedding and of the head that is the same leaf."""

    embedding: str
    head: str


def find(model: TorchBase) -> Tied | None:
    """The embedding of a tree that has no leaf for its head; None where there is none."""
    heads = [
        entry.torch
        for entry in model.naming.entries
        if entry.kind == "linear"
        and isinstance(entry.torch, str)
        and not placeholders(entry.torch)
        and not model.leaves.keys() & set(entry.paths)
    ]
    embeddings = [name for name in model.index if model.kind(name) == "embedding"]
    if len(heads) == len(embeddings) == 1:
        return Tied(embeddings[0], heads[0])
    return None


def transpose_for_head(factors: TorchFactors) -> TorchFactors:
    """The head's factors: the embedding's, transposed."""
    return TorchFactors(factors.b.T, factors.a.T, factors.scale)


def drop_copies(
    tensors: Mapping[str, np.ndarray], config: PeftConfig, model: TorchBase
) -> tuple[dict[str, np.ndarray], list[str]]:
    """A file's tensors without those of a tied head, and those that are no copies."""
    tied = find(model)
    if tied is None or not config.ensure_weight_tying:
        return dict(tensors), []
    head, embedding = (
        f"{tensor_names.PREFIX}{module_of(name)}." for name in (tied.head, tied.embedding)
    )
    (a, b), (own_a, own_b) = tensor_names.endings("linear"), tensor_names.endings("embedding")
    original = {a: own_b, b: own_a, "weight": "weight", "base_layer.weight": "base_layer.weight"}
    kept, problems = {}, []
    for name, tensor in tensors.items():
        ending = name.removeprefix(head)
        if ending == name or ending not in original:
            kept[name] = tensor
            continue
        other = tensors.get(embedding + original[ending])
        turned = tensor.T if ending in (a, b) else tensor
        if other is None or not np.array_equal(other, turned):
            problems.append(f"{name}: is not the embedding's, which is the head too in this tree")
    return kept, problems


def drop_lookup_alone(contents: Contents, config: PeftConfig, model: TorchBase) -> list[str]:
    """Embeddings that PEFT adapts as a lookup alone, which here are the head too; taken out."""
    tied = find(model)
    if tied is None or config.ensure_weight_tying:
        return []
    found = [*contents.factors, *contents.whole]
    if tied.embedding not in found:
        return []
    contents.factors.pop(tied.embedding, None)
    contents.whole.pop(tied.embedding, None)
    return [
        f"{tied.embedding}: PEFT adapts it as a lookup alone (ensure_weight_tying is false), and "
        f"in this tree it is {module_of(tied.head)} too"
    ]


def head_of(contents: Contents, model: TorchBase) -> Tied | None:
    """The tied pair where the contents adapt it."""
    tied = find(model)
    adapted = tied is not None and tied.embedding in {*contents.factors, *contents.whole}
    return tied if adapted else None
