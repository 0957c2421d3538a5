"""Recordings of any length: parts of half a minute, each from the last timestamp before."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_jax.core.errors import ConfigError
from lora_jax.models.speech.timestamps import PRECISION, Timestamps
from lora_jax.models.speech.transcription import transcribe

_FRAMES = 2  # between two timestamps


@dataclass(frozen=True)
class Part:
    """A part of a recording.

    Attributes:
      start, end: in seconds.
      tokens: of what is said in it, its timestamps included, which count from the window it was
        found in.
    """

    start: float
    end: float
    tokens: tuple[int, ...]


def transcribe_long(
    apply: Callable[..., Any],
    params: Any,
    features: Any,
    prompt: Sequence[int],
    *,
    window: int,
    timestamps: Timestamps,
    steps: int,
    **options: Any,
) -> list[Part]:
    """Transcribe one recording of any length, as OpenAI's and transformers' sequential decoding.

    Each window begins where the last complete part of the one before ended. Decoding is greedy,
    without a second try at higher temperatures, and without the text so far in the prompt.

    Args:
      apply, params: as in `transcribe`.
      features: `[frames, mel bins]` of the whole recording, `log_mel(audio, frames=None)`.
      prompt: as in `transcribe`, for one row, without `<|notimestamps|>`.
      window: `config.frames` of the model, 3000 for half a minute.
      timestamps: their rules.
      steps: maximum number of tokens per window.
      **options: `suppress` and `begin_suppress` as in `transcribe`.

    Returns:
      The parts, in the order of their times.

    Raises:
      ConfigError: the features are not those of one recording.
      ValueError: as in `transcribe`.
    """
    heard = np.asarray(features)
    if heard.ndim != 2 or not len(heard):
        raise ConfigError(
            f"features must be [frames, mel bins] of one recording, got {list(heard.shape)}"
        )
    found: list[Part] = []
    seek = 0
    while seek < len(heard):
        piece = heard[seek : seek + window]
        padded = np.pad(piece, [(0, window - len(piece)), (0, 0)])
        stop = {timestamps.end}
        tokens = transcribe(
            *(apply, params, padded[None], [*prompt]),
            **{"steps": steps, "stop": stop, "timestamps": timestamps, **options},
        )[0].tolist()
        tokens = tokens[:-1] if tokens[-1] == timestamps.end else tokens
        parts, moved = _parts(tokens, timestamps.first, len(piece))
        start = seek / _FRAMES * PRECISION
        found += [
            Part(start + one * PRECISION, start + other * PRECISION, said)
            for one, other, said in parts
        ]
        seek += moved or len(piece)  # a window in which nothing ends is left behind
    return found


def _parts(
    tokens: list[int], first: int, frames: int
) -> tuple[list[tuple[int, int, tuple[int, ...]]], int]:
    """Return a window's parts, their times counted in timestamps, and the frames that are done."""
    is_time = [token >= first for token in tokens]
    ends = [i + 1 for i in range(len(tokens) - 1) if is_time[i] and is_time[i + 1]]
    if not ends:
        times = [token - first for token in tokens if token >= first]
        last = times[-1] if times and times[-1] else frames // _FRAMES
        return [(0, last, tuple(tokens))], frames
    is_whole = is_time[-2:] == [False, True]
    ends = [*ends, len(tokens)] if is_whole else [*ends[:-1], ends[-1] + 1]
    found, start = [], 0
    for end in ends:
        part = tokens[start:end]
        last = part[-1] if is_whole or end != ends[-1] else part[-2]
        found.append((part[0] - first, last - first, tuple(part)))
        start = end
    return found, frames if is_whole else (tokens[start - 2] - first) * _FRAMES
