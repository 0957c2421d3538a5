"""Several adapters on one base, as a stack whose slots rows of one batch name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lora_jax as lora
from lora_jax.cli import sources
from lora_jax.cli.errors import AdapterOptionError
from lora_jax.cli.fit import Fit
from lora_jax.core.errors import StructureError
from lora_jax.files import kinds
from lora_jax.models import Pretrained


def needs_scan(paths: Sequence[Path]) -> bool:
    """Return whether adapters need a model whose layers are stacked.

    Raises:
      AdapterOptionError: some need it, and others need single layers.
    """
    found = [kinds.adapter(path) for path in paths]
    stacked = [sources.is_stacked(x) for x in found]
    flat = [x.kind == kinds.NATIVE and not s for x, s in zip(found, stacked, strict=True)]
    if any(stacked) and any(flat):
        raise AdapterOptionError(
            f"{paths[stacked.index(True)]} is for stacked layers and {paths[flat.index(True)]} for "
            "single ones; make a PEFT adapter of one by 'lora-jax convert --to peft'"
        )
    return any(stacked)


def load_overlay(model: Pretrained, path: Path, fit: Fit, instead: str) -> Any:
    """Load an adapter that shares its base with others.

    Args:
      model: the base.
      path: of the adapter.
      fit: how it is fitted onto the model.
      instead: what to do with an adapter that changes the model.

    Raises:
      AdapterOptionError: it changes the model.
      LoraError: it cannot be read, or does not fit.
    """
    loaded = sources.put_on(model, kinds.adapter(path), fit)
    if loaded.model is not model:
        raise AdapterOptionError(
            f"{path}: changes the model's vocabulary or its output head, so it cannot share a "
            f"batch with other adapters; {instead}"
        )
    return loaded.adapters


def stack_overlays(paths: Sequence[Path], overlays: Sequence[Any]) -> Any:
    """Return the overlays that were loaded from `paths` as one stack.

    Raises:
      AdapterOptionError: they adapt a weight in different ways.
    """
    try:
        return lora.stack(overlays)
    except StructureError as error:
        names = ", ".join(f"adapter {i} is {path}" for i, path in enumerate(paths))
        raise AdapterOptionError(f"--adapter: {error}\n({names})") from error
