"""SentencePiece's BPE (https://arxiv.org/abs/1808.06226) from GGUF metadata."""

import math
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers

from lora_jax.core.errors import ModelFileError
from lora_jax.core.foreign import shown

NORMAL, _UNKNOWN = 1, 2  # types of tokens
_SPACE = "▁"
_LONGEST = 512  # characters of a piece; SentencePiece's own limit is 16 by default


def from_pieces(
    tokens: Sequence[str], types: Sequence[int], scores: Any, *, space_prefix: bool
) -> Tokenizer:
    """Build a tokenizer that joins the pair whose piece has the highest score, again and again.

    Args:
      tokens: all pieces, by id; what is not in them is split into bytes `<0x00>` ..., if there are.
      types: llama.cpp's type of each.
      scores: a number for each.
      space_prefix: whether a text begins with a space.

    Raises:
      ModelFileError: scores are not one number for each token, or pieces do not fit together.
    """
    found = [float(x) for x in scores] if _are_numbers(scores) else []
    if len(found) != len(tokens) or not all(map(math.isfinite, found)):
        raise ModelFileError(
            f"tokenizer.ggml.scores must be {len(tokens)} finite numbers, one for each token"
        )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    pairs = _pairs(vocabulary, types, found)
    try:
        model = models.BPE(
            vocabulary,
            pairs,
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback="<0x00>" in vocabulary,
        )
    except Exception as error:  # tokenizers raises nothing more precise
        raise ModelFileError(
            f"the tokens of tokenizer.ggml are not SentencePiece's: {error}"
        ) from error
    tokenizer = Tokenizer(model)
    prepend: list[Any] = [normalizers.Prepend(_SPACE)] if space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    strip: list[Any] = [decoders.Strip(" ", 1, 0)] if space_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _are_numbers(scores: Any) -> bool:
    return getattr(scores, "ndim", None) == 1 and scores.dtype.kind in "fiu"


def _pairs(
    vocabulary: dict[str, int], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Return all pairs of pieces that make a piece, the highest score first."""
    found: list[tuple[float, int, int, str, str]] = []
    for token, number in vocabulary.items():
        if types[number] != NORMAL:
            continue
        if len(token) > _LONGEST:
            raise ModelFileError(
                f"the token {shown(token)} has {len(token)} characters, more than {_LONGEST}"
            )
        for cut in range(1, len(token)):
            first, second = token[:cut], token[cut:]
            if first in vocabulary and second in vocabulary:
                order = (-scores[number], vocabulary[first], vocabulary[second])
                found.append((*order, first, second))
    return [(first, second) for *_, first, second in sorted(found)]
