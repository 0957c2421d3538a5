"""Which answer, or which of two completions, a language model finds more probable."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

import lora_jax as lora
from lora_jax.cli.jobs.evaluating.subject import Notes, Settings, Subject
from lora_jax.core.tree import adapted_nodes
from lora_jax.training.chunked_loss import (
    token_losses_of_frozen_head,
    token_losses_of_trained_head,
)
from lora_jax.training.dataset import Rows
from lora_jax.training.evaluation.choices import (
    Question,
    encode_choices,
    judge,
    log_probs_of_texts,
)
from lora_jax.training.preference.pairs import Pair, encode_pairs
from lora_jax.training.tokenize import Example


def choices(
    files: Sequence[Rows], subject: Subject, settings: Settings, notes: Notes
) -> dict[str, Any]:
    """Return how often the right answer has the highest log-probability.

    Raises:
      DataError: rows cannot be encoded.
    """
    length, vocabulary = subject.length(settings), subject.loaded.model.config.vocab_size
    questions: list[Question] = []
    for rows in files:
        found, said = encode_choices(rows, subject.tokenizer, length + 1, vocabulary=vocabulary)
        questions += found
        notes.say(said)
    return {
        "questions": len(questions),
        **judge(_log_probs(subject, length, settings), questions),
    }


def preferences(
    files: Sequence[Rows], subject: Subject, settings: Settings, notes: Notes
) -> dict[str, Any]:
    """Return how often the chosen completion is more probable, and by how much on average.

    Raises:
      DataError: rows cannot be encoded.
    """
    length, vocabulary = subject.length(settings), subject.loaded.model.config.vocab_size
    pairs: list[Pair] = []
    for rows in files:
        found = encode_pairs(rows, subject.tokenizer, length + 1, vocabulary=vocabulary)
        pairs += found.pairs
        notes.say(found.notes)
    of = _log_probs(subject, length, settings)
    texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    chosen, rejected = of(texts).reshape(-1, 2).T
    margins = chosen - rejected
    return {
        "pairs": len(pairs),
        "accuracy": float((margins > 0).mean()),
        "log_prob_margin": float(margins.mean()),
    }


def _log_probs(
    subject: Subject, length: int, settings: Settings
) -> Callable[[Sequence[Example]], np.ndarray]:
    model, params = subject.trainable(), subject.loaded.params
    if model.head_path in adapted_nodes(params):
        losses = token_losses_of_trained_head(model.hidden, model.logits)
    else:
        losses = token_losses_of_frozen_head(model.hidden, model.head, None, model.finish)
    return partial(_of_texts, lora.lora(losses), params, length=length, rows=settings.batch)


def _of_texts(
    losses: Any, params: Any, texts: Sequence[Example], length: int, rows: int
) -> np.ndarray:
    return log_probs_of_texts(losses, params, texts, length, rows)
