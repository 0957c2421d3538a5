"""Log-mel spectrograms of recordings, as Whisper takes them."""

from typing import Any

import numpy as np

from lora_jax.core.checks import is_size
from lora_jax.core.errors import ConfigError
from lora_jax.core.foreign import shown_value

RATE, WINDOW, HOP = 16_000, 400, 160  # samples per second, per frame, and between frames
_HIGHEST = 8000.0  # Hz
_FLOOR, _RANGE = 1e-10, 8.0  # of the power, and of its logarithm


def log_mel(
    audio: Any, *, bins: int = 80, frames: int | None = 3000, rate: int = RATE
) -> np.ndarray:
    """Return the log-mel spectrogram of recordings, as Whisper was trained with it.

    Args:
      audio: samples from -1 to 1 at 16 kHz, `[samples]` or `[batch, samples]`. Shorter recordings
        are padded with silence, longer ones are cut.
      bins: `num_mel_bins` of the model, 80 or 128.
      frames: 100 per second: `config.frames` of the model, 3000 for half a minute; None for all of
        a recording of any length, as `transcribe_long` takes it.
      rate: samples per second.

    Returns:
      float32 `[batch, frames, bins]`; with one axis less if `audio` has one.

    Raises:
      ConfigError: the samples are not finite floats, a number is not positive, the rate is not
        16 kHz, or `frames` is None and the recording shorter than a frame.

    >>> log_mel(np.zeros(16_000), bins=4, frames=100).shape
    (100, 4)
    """
    if not is_size(bins) or not (frames is None or is_size(frames)):
        raise ConfigError(
            f"bins and frames must be positive ints, got {shown_value(bins)} and "
            f"{shown_value(frames)}"
        )
    if rate != RATE:
        raise ConfigError(
            f"rate is {shown_value(rate)}, but Whisper hears {RATE} samples per second: resample "
            "the recording first, for example with scipy.signal.resample_poly"
        )
    x = np.asarray(audio)
    if x.ndim not in (1, 2) or not np.issubdtype(x.dtype, np.floating) or not np.isfinite(x).all():
        raise ConfigError(
            "audio must be finite floats [samples] or [batch, samples] from -1 to 1, got "
            f"{x.dtype} {list(x.shape)}"
        )
    if x.ndim == 1:
        return log_mel(x[None], bins=bins, frames=frames)[0]
    samples = x.shape[1] if frames is None else frames * HOP
    frames = samples // HOP
    if not frames:
        raise ConfigError(f"audio has {samples} samples, fewer than the {HOP} of a frame")
    x = np.pad(x[:, :samples], [(0, 0), (0, max(0, samples - x.shape[1]))]).astype(np.float64)
    x = np.pad(x, [(0, 0), (WINDOW // 2, WINDOW // 2)], mode="reflect")
    framed = np.lib.stride_tricks.sliding_window_view(x, WINDOW, axis=1)[:, ::HOP][:, :frames]
    window = np.hanning(WINDOW + 1)[:-1]
    power = np.abs(np.fft.rfft(framed * window)) ** 2
    logs = np.log10(np.maximum(power @ mel_filters(bins), _FLOOR))
    logs = np.maximum(logs, logs.max((1, 2), keepdims=True) - _RANGE)
    return ((logs + 4) / 4).astype(np.float32)


def mel_filters(bins: int) -> np.ndarray:
    """Return Slaney's triangular filters of equal area, `[frequencies, bins]`."""
    frequencies = np.linspace(0, RATE / 2, WINDOW // 2 + 1)
    edges = _to_hertz(np.linspace(0, _to_mel(_HIGHEST), bins + 2))
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    up = (frequencies[:, None] - low) / (middle - low)
    down = (high - frequencies[:, None]) / (high - middle)
    return np.maximum(0, np.minimum(up, down)) * (2 / (high - low))


_LINEAR, _STEP = 15.0, 27.0 / np.log(6.4)  # mels up to 1000 Hz, and per e-fold above


def _to_mel(hertz: float) -> float:
    return _LINEAR + np.log(hertz / 1000) * _STEP


def _to_hertz(mels: np.ndarray) -> np.ndarray:
    return np.where(mels < _LINEAR, mels * 200 / 3, 1000 * np.exp((mels - _LINEAR) / _STEP))
