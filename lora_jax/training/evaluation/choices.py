"""Which of several answers a language model finds most probable."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from lora_jax.training.batching import Data, batches
from lora_jax.training.chunked_loss import TokenLosses
from lora_jax.training.cross_entropy import JaxBatch, sum_by_text
from lora_jax.training.dataset import Rows
from lora_jax.training.encoders import Encoder, SpanEncoder, surrounding
from lora_jax.training.errors import DataError
from lora_jax.training.packing import assign, lay_out, number_segments, number_sources
from lora_jax.training.tokenize import Example
from lora_jax.training.vocabulary import refuse_unknown

KIND = "choice"  # of rows
_SLOTS = 64  # maximum texts per row


@dataclass(frozen=True)
class Question:
    """The answers to one question, each as a text that begins with the question.

    Attributes:
      texts: of which the tokens that train are the answer.
      sizes: characters of each answer.
      right: the number of the right answer.
    """

    texts: tuple[Example, ...]
    sizes: tuple[int, ...]
    right: int


def encode_choices(
    rows: Rows, tokenizer: Encoder, length: int, *, vocabulary: int | None = None
) -> tuple[tuple[Question, ...], tuple[str, ...]]:
    """Encode questions with each of their answers, without EOS, and return notes about them.

    A space is put between a prompt and an answer where neither has one. The beginning of a text of
    more than `length` tokens is dropped.

    Args:
      rows: rows of kind "choice".
      tokenizer: turns text into ids.
      length: maximum number of tokens per text.
      vocabulary: number of the model's tokens, to refuse ids beyond it.

    Raises:
      DataError: an answer alone is longer, or a token is not in the vocabulary.
    """
    found, long = [], 0
    for row, place in zip(rows.rows, rows.places, strict=True):
        prompt, choices = row.values["prompt"], row.values["choices"]
        whole = [_encode(prompt, choice, tokenizer) for choice in choices]
        refuse_unknown(
            rows.source, [place] * len(whole), [x.ids for x in whole], tokenizer, vocabulary
        )
        long += any(len(text) > length for text in whole)
        texts = tuple(Example(x.ids[-length:], x.trains[-length:]) for x in whole)
        if any(text.trains[0] and len(text) == length for text in texts):
            raise DataError(
                f"{rows.source}, {place}: a choice has {length} tokens or more; increase --length"
            )
        found.append(Question(texts, tuple(map(len, choices)), row.values["answer"]))
    notes = (f"{long} of {len(found)} questions exceed {length} tokens: their beginnings are cut",)
    return tuple(found), notes if long else ()


def _encode(prompt: str, choice: str, tokenizer: Encoder) -> Example:
    is_apart = not prompt or prompt[-1].isspace() or choice[0].isspace()
    choice = choice if is_apart else f" {choice}"
    if isinstance(tokenizer, SpanEncoder):
        asked, said = tokenizer.encode_continued(prompt, choice)
    else:
        asked = [*surrounding(tokenizer)[0], *tokenizer.encode(prompt)]
        said = tokenizer.encode(choice)
    trains = np.arange(len(asked) + len(said)) >= len(asked)
    return Example(np.array([*asked, *said], np.int32), trains)


def log_probs_of_texts(
    losses: TokenLosses, params: Any, texts: Sequence[Example], length: int, rows: int
) -> np.ndarray:
    """Return the log-probability of the tokens of each text that train, float64 `[n]`.

    Args:
      losses: compiled here; with adapters give `lora_jax.lora` of it.
      params: its parameters.
      texts: each of at most `length + 1` tokens.
      length: tokens per row that the model reads.
      rows: rows per batch.
    """
    data = _pack(texts, length)
    slots = data.arrays["source"].shape[1]
    run = jax.jit(partial(_sums, losses, slots=slots))
    found = np.zeros(len(texts))
    for batch in batches(data, min(rows, len(data))):
        source, there = batch["source"], batch["there"]
        read = {name: batch[name] for name in ("ids", "segments", "weights")}
        found[source[there]] = np.asarray(run(params, read), np.float64)[there]
    return found


def _pack(texts: Sequence[Example], length: int) -> Data:
    capacity, lengths = length + 1, [len(text) for text in texts]
    rows = assign(lengths, capacity, min(_SLOTS, capacity))
    source = number_sources(rows, max(map(len, rows)))
    return Data(
        {
            "ids": lay_out(rows, [text.ids for text in texts], capacity),
            "segments": number_segments(rows, lengths, capacity),
            "weights": lay_out(rows, [text.trains.astype(np.float32) for text in texts], capacity),
            "source": source,
            "there": source >= 0,
        }
    )


def _sums(losses: TokenLosses, params: Any, batch: JaxBatch, slots: int) -> jax.Array:
    before, here = batch["segments"][:, :-1], batch["segments"][:, 1:]
    counted = (batch["weights"][:, 1:] > 0) & (before == here)
    return -sum_by_text(losses(params, batch), here, counted, slots)


def judge(
    log_probs: Callable[[Sequence[Example]], np.ndarray], questions: Sequence[Question]
) -> dict[str, float]:
    """Return "accuracy" and "normalized_accuracy": how often the right answer comes first.

    The one takes the answer with the highest log-probability, the other one that with the highest
    log-probability per character, which does not favour short answers.

    Args:
      log_probs: of texts.
      questions: from `encode_choices`.
    """
    found = log_probs([text for question in questions for text in question.texts])
    starts = np.cumsum([0, *(len(question.texts) for question in questions)])
    right = [0, 0]
    for question, start in zip(questions, starts, strict=False):
        of = found[start : start + len(question.texts)]
        right[0] += int(of.argmax()) == question.right
        right[1] += int((of / question.sizes).argmax()) == question.right
    accuracy, normalized = (count / len(questions) for count in right)
    return {"accuracy": accuracy, "normalized_accuracy": normalized}
