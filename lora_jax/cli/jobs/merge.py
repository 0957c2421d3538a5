"""What `lora-jax merge` does: merge, copy the other files, report what rounding lost."""

import dataclasses
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax as lora
from lora_jax import models
from lora_jax.cli import classifiers, sources
from lora_jax.cli.errors import OutputError
from lora_jax.cli.fit import Fit
from lora_jax.cli.options import refuse_existing
from lora_jax.core.errors import MergeError
from lora_jax.core.foreign import escaped, shown
from lora_jax.core.paths import flatten_with_paths
from lora_jax.files import kinds
from lora_jax.files.disk.atomic import write_directory
from lora_jax.models import hf_directory, published_classifier
from lora_jax.models.own_files import read_own_files, read_tokenizer_files
from lora_jax.models.stops import GENERATION_CONFIG

NOTABLE = 0.1  # fraction of an update lost in rounding that deserves a warning


def run(model: str, adapter: Path, out: Path, *, dtype: str | None, force: bool, fit: Fit) -> None:
    """Write `out`; the arguments are the command's options.

    Raises:
      OutputError: something exists at `out`, without `force`, or it is the base itself.
      LoraError: model or adapter cannot be read, or they do not fit each other.
    """
    base = sources.find_model(model)
    if out.exists() and base.path.exists() and out.samefile(base.path):
        raise OutputError(
            f"{out}: is the base model itself, which is never changed; choose another --out"
        )
    if (out / hf_directory.INDEX).exists():
        raise OutputError(f"{out}: contains a model in several files; choose another --out")
    refuse_existing(out, force)
    is_classifier = bool(classifiers.find(base, adapter))
    load = _classifier if is_classifier else _language_model
    merged, errors = load(base, adapter, dtype, fit)
    beside = _beside(base, adapter)
    stored: Mapping[str, hf_directory.StoredTensor] | None = None
    if dtype is None and base.kind == kinds.CHECKPOINT:
        stored = hf_directory.tensors(base.path)
        if is_classifier:
            stored = published_classifier.renamed(merged.kind, stored)
    write_directory(out, beside | models.files(merged, stored))
    name = _dtypes(merged.params, errors)
    place = escaped(str(out))
    print(f"wrote {place}: {len(errors)} merged weights in {name}, {len(beside)} other files")
    _report(errors, name)


def _language_model(
    base: kinds.Found, adapter: Path, dtype: str | None, fit: Fit
) -> tuple[models.Pretrained, dict[str, float]]:
    """Return the merged model, and how much of each update rounding lost."""
    loaded = sources.load(base, adapter, fit=fit, as_stored=True)
    params, errors = _merge(loaded.params, dtype)
    return dataclasses.replace(loaded.model, params=params), errors


def _classifier(
    base: kinds.Found, adapter: Path, dtype: str | None, fit: Fit
) -> tuple[models.Pretrained, dict[str, float]]:
    """Return the merged classifier as transformers reads it, and the errors as above."""
    loaded = classifiers.load(base, adapter, fit=fit, as_stored=True)
    if loaded.pooling != published_classifier.FAMILIES[loaded.model.kind].pooling:
        raise OutputError(
            f"{adapter}: its head reads the mean over a text's tokens, which no classifier of "
            "transformers does; use it with 'lora-jax predict', or train with --pooling model"
        )
    params, errors = _merge(loaded.params, dtype)
    pad_id = sources.pad_id_of(base, adapter)
    merged = published_classifier.published(loaded.model, params, loaded.labels, pad_id)
    return merged, {path.removeprefix("encoder/"): error for path, error in errors.items()}


def _merge(params: Any, dtype: str | None) -> tuple[Any, dict[str, float]]:
    merged, errors = lora.merge(params, dtype, donate=True, return_error=True)
    if dtype is not None:  # those without an adapter are rounded too
        merged = _cast(merged, dtype)
    return merged, errors


def _cast(params: Any, dtype: str) -> Any:
    """Return the parameters in this dtype.

    Raises:
      MergeError: values that are finite overflow it.
    """
    leaves, treedef = flatten_with_paths(params)
    cast = {path: x.astype(dtype) for path, x in leaves.items()}
    over = [p for p, x in leaves.items() if (jnp.isfinite(x) & ~jnp.isfinite(cast[p])).any()]
    if over:
        raise MergeError(
            f"values of {shown(', '.join(over))} overflow {dtype}; --dtype bfloat16 or float32 "
            "holds them"
        )
    return jax.tree_util.tree_unflatten(treedef, list(cast.values()))


def _dtypes(params: Any, merged: Mapping[str, Any]) -> str:
    """Return the dtypes of the merged leaves, as words."""
    leaves, _ = flatten_with_paths(params)
    return " and ".join(sorted({str(x.dtype) for path, x in leaves.items() if path in merged}))


def _beside(base: kinds.Found, adapter: Path) -> dict[str, bytes]:
    """Return the model's other files; a tokenizer beside the adapter comes first."""
    own = kinds.adapter(adapter).path
    if base.kind == kinds.CHECKPOINT:
        return read_own_files(base.path, own)
    tokenizer = sources.tokenizer_of(base)
    ends = {"eos_token_id": sorted(sources.stop_ids(base, tokenizer))}
    generation = {GENERATION_CONFIG: (json.dumps(ends) + "\n").encode()}
    return generation | tokenizer.files() | read_tokenizer_files(own)


def _report(errors: Mapping[str, float], dtype: str) -> None:
    """Print how much of the updates was lost in rounding."""
    if not errors:
        return
    worst = max(errors, key=lambda path: errors[path])
    if errors[worst] == 0:
        print(f"rounding error of the updates in {dtype}: none")
        return
    median = statistics.median(errors.values())
    print(
        f"relative rounding error of the updates in {dtype}: median {median:.2g}, maximum "
        f"{errors[worst]:.2g} ({shown(worst)})"
    )
    if errors[worst] > NOTABLE:
        print(
            f"warning: {dtype} is too coarse for this update; --dtype float32 keeps it",
            file=sys.stderr,
        )
