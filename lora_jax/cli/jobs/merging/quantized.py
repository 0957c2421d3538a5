"""`lora-jax merge --quantize`: an adapter merged into the codes of its base."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lora_jax as lora
from lora_jax import models
from lora_jax.cli import classifiers, sources
from lora_jax.cli.fit import Fit
from lora_jax.cli.jobs.merging.classifier import published
from lora_jax.core.errors import ConfigError
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.quantized.weight import is_quantized
from lora_jax.files import kinds


@dataclasses.dataclass(frozen=True)
class Requantized:
    """A merged model with codes.

    Attributes:
      model: as `models.save` writes it.
      errors: how much of the update of each leaf was lost in rounding.
      format: of the merged leaves, as words: "nf4".
    """

    model: models.Pretrained
    errors: Mapping[str, float]
    format: str


def merge(
    base: kinds.Found, adapter: Path, quantize: str, dtype: str | None, fit: Fit
) -> Requantized:
    """Quantize the base as training does, add the adapter, and round to codes again.

    Raises:
      ConfigError: the file has codes of a kind that cannot be written.
      LoraError: as `sources.load` and `lora.merge`.
    """
    options: dict[str, Any] = {"quantize": quantize, "as_stored": dtype is None}
    if not classifiers.find(base, adapter):
        loaded = sources.load(base, adapter, dtype, fit, **options)
        params, errors, form = _merge(loaded.params)
        return Requantized(dataclasses.replace(loaded.model, params=params), errors, form)
    classifier = classifiers.load(base, adapter, dtype, fit, **options)
    params, errors, form = _merge(classifier.params)
    return Requantized(published(classifier, params, base, adapter), errors, form)


def _merge(params: Any) -> tuple[Any, dict[str, float], str]:
    try:
        merged, errors = lora.merge(params, requantize=True, return_error=True, donate=True)
    except ConfigError as error:
        raise ConfigError(_reword(str(error))) from error
    leaves, _ = flatten_with_paths(merged)
    forms = {x.kind if is_quantized(x) else str(x.dtype) for p, x in leaves.items() if p in errors}
    return merged, errors, " and ".join(sorted(forms))


def _reword(message: str) -> str:
    """Return a message of `lora.merge` in the words of the command line."""
    return message.replace("requantize=", "--quantize ").replace("requantize", "--quantize")
