"""A merged classifier, as transformers reads it."""

from pathlib import Path
from typing import Any

from lora_jax import models
from lora_jax.cli import sources
from lora_jax.cli.classifiers import LoadedClassifier
from lora_jax.cli.errors import OutputError
from lora_jax.files import kinds
from lora_jax.models import published_classifier


def published(
    loaded: LoadedClassifier, params: Any, base: kinds.Found, adapter: Path
) -> models.Pretrained:
    """Return a classifier with these parameters, which are merged.

    Raises:
      OutputError: its head reads the mean over a text's tokens.
    """
    model = loaded.model
    if loaded.pooling != published_classifier.head_of_family(model.family, model.settings).pooling:
        raise OutputError(
            f"{adapter}: its head reads the mean over a text's tokens, which no classifier of "
            "transformers does; use it with 'lora-jax predict', or train with --pooling model"
        )
    pad_id = sources.pad_id_of(base, adapter)
    return published_classifier.published(model, params, loaded.labels, pad_id)
