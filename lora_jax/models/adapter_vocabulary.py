"""Give a model the vocabulary and the output head that an adapter of PEFT was trained on."""

import os
from dataclasses import dataclass

import numpy as np

from lora_jax.files import peft
from lora_jax.files.peft import tensor_names
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.pretrained import Pretrained
from lora_jax.models.vocabulary import resize_vocabulary, untie_head

_HEAD = "lm_head.weight"


def resize_for_adapter(model: Pretrained, adapter: str | os.PathLike | peft.PeftFile) -> Pretrained:
    """Return a model with as many tokens as an adapter's, and with a separate head if it has one.

    If the vocabulary was resized, PEFT saves the whole embedding and head beside the factors; the
    new rows of the model take their values. A head that is tied to the embedding is untied where
    the adapter treats the two differently.

    Args:
      model: the published model, without adapters.
      adapter: the adapter's directory, or what `peft.read_file` returns.

    Raises:
      AdapterFileError: the adapter cannot be read.
    """
    if not model.family.embedding:
        return model
    file = adapter if isinstance(adapter, peft.PeftFile) else peft.read_file(adapter)
    embedding, head = _find(file, _embedding_name(model)), _find(file, _HEAD)
    is_tied = isinstance(model.config, DecoderConfig) and model.config.tie_word_embeddings
    if is_tied and not file.config.ensure_weight_tying and _differ(embedding, head):
        model = untie_head(model)
    tables = [x for x in (embedding.base, head.base) if x is not None]
    old = model.config.vocab_size
    if not tables or len(tables[0]) == old or len({x.shape for x in tables}) > 1:
        return model  # `peft.load` says what does not fit
    rows = ["mean" if x is None else x[old:] for x in (embedding.base, head.base)]
    has_head = "head" in model.params
    return resize_vocabulary(model, len(tables[0]), rows[0], rows[1] if has_head else "mean")


@dataclass(frozen=True)
class _Table:
    """What a file has for an embedding or a head."""

    trained: np.ndarray | None  # its whole value in the adapted model
    base: np.ndarray | None  # its value in the base; the trained one if only that is known
    is_adapted: bool  # whether it has factors, or rows that are trained


def _find(file: peft.PeftFile, name: str) -> _Table:
    trained, original, is_adapted = None, None, False
    for key, tensor in file.tensors.items():
        part = tensor_names.part_of_name(key, file.tensors, (name,))
        if part is not None and part.module == name and tensor.ndim == 2:
            if part.field == tensor_names.ORIGINAL:
                original = tensor
            else:
                trained = tensor
        is_adapted |= part is not None and f"{part.module}.weight" == name
    return _Table(trained, trained if original is None else original, is_adapted)


def _differ(embedding: _Table, head: _Table) -> bool:
    """Return whether a head is not the embedding, in the model that an adapter was trained on."""
    if embedding.is_adapted or head.is_adapted:
        return True
    if head.trained is None:
        return embedding.trained is not None
    return embedding.trained is None or not np.array_equal(embedding.trained, head.trained)


def _embedding_name(model: Pretrained) -> str:
    """Return the name of the embedding's tensor in PyTorch."""
    path = "/".join(model.family.embedding)
    ((_, (name,)),) = model.naming.places({path: (1, 1)})[path].layers()
    return name
