"""Pixels as a model takes them: `preprocessor_config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.core.checks import is_integer, is_size, is_within
from lora_jax.core.errors import ConfigError, ModelFileError
from lora_jax.core.foreign import shown_value
from lora_jax.models import hf_directory

CONFIG = "preprocessor_config.json"


@dataclass(frozen=True)
class ImageProcessor:
    """Scale and normalize images, as transformers' processors do once they have the right size.

    Attributes:
      size: height and width in pixels that the model takes.
      scale: of the values before they are normalized: 1/255 for bytes.
      mean, std: of each channel, in scaled values.

    >>> process = ImageProcessor((1, 2), 1 / 255, (0.5,), (0.5,))
    >>> process(np.array([[[[0], [255]]]], np.uint8)).tolist()
    [[[[-1.0], [1.0]]]]
    """

    size: tuple[int, int]
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @classmethod
    def load(cls, directory: str | Path) -> "ImageProcessor":
        """Read a model's `preprocessor_config.json`.

        Raises:
          FileNotFoundError: the directory has none.
          ModelFileError: it is not valid JSON, or has no size, mean or deviation that can be used.
        """
        settings = hf_directory.read_config(directory, CONFIG)
        try:
            return cls._of(settings)
        except ValueError as error:
            raise ModelFileError(f"{Path(directory) / CONFIG}: {error}") from None

    @classmethod
    def _of(cls, settings: Mapping[str, Any]) -> "ImageProcessor":
        size = settings.get("crop_size") if settings.get("do_center_crop") else None
        size = settings.get("size", {}) if size is None else size
        size = {"height": size, "width": size} if is_integer(size) else size
        if isinstance(size, Mapping) and "shortest_edge" in size:
            size = dict.fromkeys(("height", "width"), size["shortest_edge"])
        given = size if isinstance(size, Mapping) else {}
        height, width = given.get("height"), given.get("width")
        if not is_size(height) or not is_size(width):
            raise ValueError(f"size must have height and width in pixels, got {shown_value(size)}")
        scale = settings.get("rescale_factor", cls.scale) if settings.get("do_rescale", True) else 1
        mean, std = settings.get("image_mean", cls.mean), settings.get("image_std", cls.std)
        if not settings.get("do_normalize", True):
            mean, std = (0.0,), (1.0,)
        if not is_within(scale, *_POSITIVE):
            raise ValueError(
                f"rescale_factor must be a positive number up to 1e6, got {shown_value(scale)}"
            )
        mean, std = _numbers("image_mean", mean, -1e6), _numbers("image_std", std, _POSITIVE[0])
        if len(mean) != len(std):
            raise ValueError(f"image_mean has {len(mean)} channels, but image_std has {len(std)}")
        return cls((height, width), float(scale), mean, std)

    def __call__(self, images: Any) -> np.ndarray:
        """Return the pixels of images.

        Args:
          images: integers or floats `[batch, height, width, channels]` of the right size; a library
            such as Pillow resizes.

        Returns:
          float32 of the same shape.

        Raises:
          ConfigError: the images have another size, or other channels.
        """
        x = np.asarray(images)
        channels = x.shape[-1] if x.ndim else 0
        if x.ndim != 4 or x.shape[1:3] != self.size or len(self.mean) not in (1, channels):
            raise ConfigError(
                f"images must be [batch, {self.size[0]}, {self.size[1]}, {len(self.mean)}], got "
                f"{x.shape}; resize them first, for example with Pillow"
            )
        mean, std = (np.asarray(x, np.float32) for x in (self.mean, self.std))
        return (x.astype(np.float32) * np.float32(self.scale) - mean) / std


_POSITIVE = (1e-6, 1e6)  # beyond, pixels are not finite


def _numbers(name: str, given: Any, low: float) -> tuple[float, ...]:
    """Return the numbers of each channel, or raise unless all are from `low` to 1e6."""
    is_list = isinstance(given, list | tuple) and len(given) > 0
    if not is_list or not all(is_within(x, low, _POSITIVE[1]) for x in given):
        raise ValueError(
            f"{name} must be a list of numbers from {low:g} to 1e6, got {shown_value(given)}"
        )
    return tuple(map(float, given))
