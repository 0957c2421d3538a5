"""What the backend of a tokenizer puts around a text and does to spans of characters."""

import json
from itertools import takewhile
from typing import Any

import tokenizers


def without_repeats(encoding: Any, ended: bool = True) -> list[int]:
    """Return the ids of one encoding, without a second beginning or end.

    Where the text itself spells out what the tokenizer adds, it is there once: "<s>Hi" has one <s>.

    Args:
      encoding: made with `add_special_tokens=True`.
      ended: keep what the tokenizer adds after the text.
    """
    ids, added = encoding.ids, encoding.special_tokens_mask
    first = sum(1 for _ in takewhile(bool, added))
    last = len(ids) - sum(1 for _ in takewhile(bool, reversed(added[first:])))
    before, own, after = ids[:first], ids[first:last], ids[last:]
    if own[: len(before)] == before:
        before = []
    if not ended or own[len(own) - len(after) :] == after:
        after = []
    return before + own + after


def beginning(backend: tokenizers.Tokenizer) -> list[int]:
    """Return the ids that a tokenizer puts before a text; an empty text does not tell them."""
    encodings = (backend.encode(text) for text in ("a", "0", "."))
    found = next((x for x in encodings if not all(x.special_tokens_mask)), None)
    if found is None:
        return []
    pairs = zip(found.ids, found.special_tokens_mask, strict=True)
    return [i for i, _ in takewhile(lambda x: x[1], pairs)]


def without_trimming(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return a tokenizer of the same ids whose spans contain the spaces at their ends.

    Many tokenizers trim their spans, so a token of spaces alone would stand nowhere.
    """
    processor = backend.post_processor
    if processor is None or not _trims(json.loads(processor.__getstate__())):
        return backend
    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    copy.post_processor = None
    return copy


def _trims(processor: dict[str, Any]) -> bool:
    parts = processor.get("processors", [])
    return bool(processor.get("trim_offsets")) or any(map(_trims, parts))
