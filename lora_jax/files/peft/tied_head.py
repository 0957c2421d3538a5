"""Embeddings that are also the output head: one leaf here, two modules with equal tensors in PEFT.

PEFT adapts both only if the configuration says `ensure_weight_tying`; the head then has the
embedding's factors, transposed. The naming has a row for the head, but the tree has no such leaf.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from lora_jax.files.naming.patterns import placeholders
from lora_jax.files.peft import tensor_names
from lora_jax.files.torch_adapters.contents import Contents, TorchBase, module_of
from lora_jax.files.torch_adapters.factors import TorchFactors

#: The endings of tensors that the head and the embedding have alike.
_SAME = (
    "weight",
    "base_layer.weight",
    "modules_to_save.weight",
    "original_module.weight",
    "token_adapter.base_layer.weight",
    tensor_names.ROWS,
)


@dataclasses.dataclass(frozen=True)
class Tied:
    """The PyTorch names of the weights of an embedding and of the head that is the same leaf."""

    embedding: str
    head: str

    def is_in(self, contents: Contents) -> bool:
        """Return whether the contents adapt or fully train the embedding."""
        return self.embedding in contents.factors or self.embedding in contents.whole


def find(model: TorchBase) -> Tied | None:
    """Return the embedding of a tree that has no leaf for its head, else None."""
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


def drop_copies(
    tensors: Mapping[str, np.ndarray], tied: Tied
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return a file's tensors without the head's, and a problem per tensor that is not a copy."""
    head, embedding = (
        f"{tensor_names.PREFIX}{module_of(name)}." for name in (tied.head, tied.embedding)
    )
    (a, b), (own_a, own_b) = tensor_names.endings("linear"), tensor_names.endings("embedding")
    original = {a: own_b, b: own_a} | {ending: ending for ending in _SAME}
    kept, problems = {}, []
    for name, tensor in tensors.items():
        ending = name.removeprefix(head)
        if ending == name or ending not in original:
            kept[name] = tensor
            continue
        other = tensors.get(embedding + original[ending])
        turned = tensor.T if ending in (a, b) else tensor
        if other is None or not np.array_equal(other, turned):
            problems.append(
                f"{name}: differs from the embedding {module_of(tied.embedding)}, but in this "
                "model the head is tied to it"
            )
    return kept, problems


def drop_lookup_alone(contents: Contents, tied: Tied) -> list[str]:
    """Remove the embedding where PEFT adapts its lookup alone; return the problem, if it does."""
    if not tied.is_in(contents):
        return []
    contents.factors.pop(tied.embedding, None)
    contents.whole.pop(tied.embedding, None)
    return [
        f"{tied.embedding}: PEFT adapts only the lookup (ensure_weight_tying is false), but in "
        f"this model the head {module_of(tied.head)} is tied to it"
    ]


def to_tensors(contents: Contents, tied: Tied) -> dict[str, np.ndarray]:
    """Return the head's tensors: its embedding's factors, transposed, or its trained weight."""
    factors = contents.factors.get(tied.embedding)
    if factors is None:
        return {tensor_names.PREFIX + tied.head: contents.whole[tied.embedding]}
    turned = TorchFactors(factors.b.T, factors.a.T, factors.scale)
    return tensor_names.to_tensors(module_of(tied.head), "linear", turned)
