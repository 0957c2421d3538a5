"""Loss and perplexity of a language model."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import lora_jax as lora
from lora_jax.cli.jobs.evaluating.subject import Notes, Settings, Subject
from lora_jax.cli.jobs.training.data import is_packed, language_loss
from lora_jax.core.tree import adapted_nodes
from lora_jax.training.batching import Data, cut_stream, pack_examples
from lora_jax.training.dataset import STREAM, Rows
from lora_jax.training.loop import measure
from lora_jax.training.tokenize import encode_examples, encode_stream


def perplexity(
    files: Sequence[Rows], subject: Subject, settings: Settings, notes: Notes
) -> dict[str, Any]:
    """Return rows, tokens, loss and perplexity of all that training would train on.

    Raises:
      DataError: rows cannot be encoded.
    """
    model, length = subject.trainable(), subject.length(settings)
    parts = [_batches_of(rows, subject, length, model.vocabulary, notes) for rows in files]
    data = Data({k: np.concatenate([part.arrays[k] for part in parts]) for k in parts[0].arrays})
    params = subject.loaded.params
    sums = language_loss(model, adapted_nodes(params), packed=is_packed(data))
    loss = jax.jit(lora.lora(sums))
    rows = min(settings.batch, len(data))
    found = measure(lambda adapters, base, rows: loss(base, rows), None, params, data, rows)
    return {
        "rows": len(data),
        "tokens": int(data.arrays["weights"].sum()),
        "loss": found["eval_loss"],
        "perplexity": found["perplexity"],
    }


def _batches_of(rows: Rows, subject: Subject, length: int, vocabulary: int, notes: Notes) -> Data:
    """Encode a file as training does."""
    if rows.kind == STREAM:
        return cut_stream(encode_stream(rows, subject.tokenizer, vocabulary=vocabulary), length)
    encoded = encode_examples(rows, subject.tokenizer, length + 1, vocabulary=vocabulary)
    notes.say(encoded.notes)
    return pack_examples(encoded.examples, length)
