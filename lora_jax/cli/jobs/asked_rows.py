"""Prompts as rows of batches, and the texts that continue them."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from lora_jax.cli.jobs.speaker import Speaker
from lora_jax.models import generation
from lora_jax.models.text.stop_text import until_text
from lora_jax.models.text.tokenizer import Tokenizer

_SHORTEST = 16  # tokens to which prompts of a file are padded at least


@dataclass(frozen=True)
class AskedRow:
    """The ids of a prompt, and what reads and ends the text that continues it."""

    ids: Sequence[int]
    tokenizer: Tokenizer
    ends: frozenset[int]

    def text(self, tokens: Sequence[int], stops: Sequence[str]) -> tuple[str, bool]:
        """Return the text of some tokens, and whether they end it."""
        end = next((i for i, x in enumerate(tokens) if x in self.ends), len(tokens))
        whole = "".join(self.tokenizer.stream(tokens[:end]))
        text = "".join(until_text([whole], stops))
        return text, end < len(tokens) or len(text) < len(whole)


def continue_rows(
    speaker: Speaker,
    rows: Sequence[AskedRow],
    slots: Sequence[int] | None,
    seed: int,
    padded: int = 0,
) -> list[str]:
    """Return the text of each row of one batch. A long prompt leaves fewer tokens for all.

    Args:
      slots: the adapter of each row in a stack, -1 for the base; None without a stack.
      seed: of the sampling.
      padded: pad the prompts to this length, so that batches share a compilation.

    Raises:
      PromptError: a prompt does not fit into the model.
    """
    steps = min(speaker.room(row.ids) for row in rows)
    ids, segments = generation.left_pad([row.ids for row in rows])
    fill = [(0, 0), (max(0, padded - ids.shape[1]), 0)]
    ids, segments = np.pad(ids, fill), np.pad(segments, fill)
    ends: Sequence[Collection[int]] = [row.ends for row in rows]
    said: list[list[int]] = [[] for _ in rows]
    for tokens in generation.stream(
        speaker.apply,
        speaker.params,
        ids,
        speaker.model.module.init_cache(len(rows), ids.shape[1] + steps),
        steps=steps,
        segments=segments,
        key=jax.random.key(seed),
        stop=ends,
        adapters_of=slots,
        **speaker.sampling,
    ):
        for row, token in zip(said, np.asarray(tokens).tolist(), strict=True):
            row.append(token)
        # A stop text may be complete in every row before the tokens that end it.
        if speaker.stops and all(
            row.text(x, speaker.stops)[1] for row, x in zip(rows, said, strict=True)
        ):
            break
    return [row.text(x, speaker.stops)[0] for row, x in zip(rows, said, strict=True)]


def continue_in_batches(
    speaker: Speaker,
    rows: Sequence[AskedRow],
    slots: Sequence[int] | None,
    *,
    seed: int,
    batch: int,
) -> Iterator[str]:
    """Yield the text of each row, in their order; prompts are padded to powers of two.

    The rows of a batch are of similar length, and the last batch is filled up with one of its rows.

    Args:
      slots: as in `continue_rows`.
      seed: of the first batch; each has its own.
      batch: rows at a time.

    Raises:
      PromptError: a prompt does not fit into the model; before anything is generated.
    """
    for row in rows:
        speaker.room(row.ids)
    batch = min(batch, len(rows))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    said: dict[int, str] = {}
    for number, first in enumerate(range(0, len(rows), batch)):
        some = order[first : first + batch]
        some += [some[-1]] * (batch - len(some))
        texts = continue_rows(
            speaker,
            [rows[i] for i in some],
            None if slots is None else [slots[i] for i in some],
            seed + number,
            _padded(speaker, len(rows[some[-1]].ids)),
        )
        said |= dict(zip(some, texts, strict=True))
    yield from (said[i] for i in range(len(rows)))


def _padded(speaker: Speaker, count: int) -> int:
    """Return the length to pad to: a power of two, if it leaves room for the text."""
    length = _SHORTEST
    while length < count:
        length *= 2
    longest = speaker.model.config.max_position_embeddings
    return length if length + speaker.max_tokens <= longest else count
