"""What `lora-jax merge` does: merge leaf by leaf, copy other files, report what rounding lost."""

import dataclasses
import statistics
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax

from lora_jax import models
from lora_jax.adapters.merge import check_finite
from lora_jax.cli import classifiers, sources
from lora_jax.cli.fit import Fit
from lora_jax.cli.jobs import model_output
from lora_jax.cli.jobs.merging import quantized
from lora_jax.cli.jobs.merging.classifier import published
from lora_jax.cli.jobs.merging.leaves import Merges
from lora_jax.core.foreign import escaped, shown
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.tree import adapted_nodes
from lora_jax.core.weights import is_adapted, require_whole
from lora_jax.files import kinds
from lora_jax.files.disk.atomic import Content, write_directory
from lora_jax.files.naming import Naming
from lora_jax.models import hf_directory, published_classifier, saving
from lora_jax.models.weights.sizes import MAX_SHARD_SIZE

_KEEPS = "train with --merge-aware, or merge without --quantize, to keep it"
NOTABLE = 0.1  # fraction of an update lost in rounding that deserves a warning


def run(
    model: str,
    adapter: Path,
    out: Path,
    *,
    dtype: str | None,
    quantize: str | None = None,
    force: bool,
    fit: Fit,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Write `out`; the arguments are the command's options.

    Raises:
      OutputError: something exists at `out`, without `force`, or it is the base itself.
      LoraError: model or adapter cannot be read, or they do not fit each other.
    """
    base = sources.find_model(model)
    model_output.check(out, base, force, max_shard_size)
    if quantize is not None:
        _requantized(base, adapter, out, quantize, dtype, fit, max_shard_size)
        return
    is_classifier = bool(classifiers.find(base, adapter))
    load = _classifier if is_classifier else _language_model
    merges = Merges(dtype)
    merged = load(base, adapter, merges, fit)
    beside = model_output.files_beside(base, adapter)
    stored: Mapping[str, hf_directory.StoredTensor] | None = None
    if dtype is None and base.kind == kinds.CHECKPOINT:
        stored = hf_directory.tensors(base.path)
        if is_classifier:
            stored = published_classifier.renamed(merged.family, stored)
    files = saving.streamed_files(merged, stored, max_shard_size)
    model_output.check_files(out, files)
    _write(out, beside, files, merges)
    errors = merges.errors()
    name = _dtypes(merged.params, {path.removeprefix("encoder/") for path in errors})
    _tell(out, len(beside), errors, name, "--dtype float32 keeps it")


def _requantized(
    base: kinds.Found,
    adapter: Path,
    out: Path,
    quantize: str,
    dtype: str | None,
    fit: Fit,
    max_shard_size: str,
) -> None:
    """Write a model with codes."""
    found = quantized.merge(base, adapter, quantize, dtype, fit)
    beside = model_output.files_beside(base, adapter)
    files = saving.streamed_files(found.model, max_shard_size=max_shard_size)
    model_output.check_files(out, files)
    write_directory(out, {**beside, **files})
    _tell(out, len(beside), found.errors, found.format, _KEEPS)


def _tell(out: Path, others: int, lost: Mapping[str, float], form: str, mend: str) -> None:
    """Print what was written, and how much of the updates was lost in rounding."""
    errors = {path.removeprefix("encoder/"): error for path, error in lost.items()}
    place = escaped(str(out))
    print(f"wrote {place}: {len(errors)} merged weights in {form}, {others} other files")
    _report(errors, form, mend)


def _write(
    out: Path, beside: Mapping[str, bytes], files: Mapping[str, Content], merges: Merges
) -> None:
    """Write all files, or none if a value overflowed."""
    *first, last = files
    content = files[last]

    def write_last(file: BinaryIO) -> None:
        content(file)  # type: ignore[operator]
        merges.refuse_overflow()

    write_directory(out, {**beside, **{x: files[x] for x in first}, last: write_last})


def _language_model(
    base: kinds.Found, adapter: Path, merges: Merges, fit: Fit
) -> models.Pretrained:
    """Return the model whose leaves are merged when they are written."""
    loaded = sources.load(base, adapter, fit=fit, in_files=True)
    return dataclasses.replace(
        loaded.model, params=_merged(loaded.params, loaded.model.naming, merges)
    )


def _classifier(base: kinds.Found, adapter: Path, merges: Merges, fit: Fit) -> models.Pretrained:
    """Return the classifier as transformers reads it, likewise."""
    loaded = classifiers.load(base, adapter, fit=fit, in_files=True)
    naming = published_classifier.naming_of_classifier(loaded.model.family)
    params = _merged(loaded.params, naming, merges)
    return published(loaded, params, base, adapter)


def _merged(params: Any, naming: Naming, merges: Merges) -> Any:
    """Return the tree with leaves that are merged when they are asked for."""
    nodes = adapted_nodes(params)
    for path, node in nodes.items():
        require_whole(path, node)
    check_finite(nodes)
    leaves, treedef = flatten_with_paths(params, is_leaf=is_adapted)
    places = naming.places({path: leaf.shape for path, leaf in leaves.items()})
    merged = [merges.of(path, leaf, places[path]) for path, leaf in leaves.items()]
    return jax.tree_util.tree_unflatten(treedef, merged)


def _dtypes(params: Any, merged: Collection[str]) -> str:
    """Return the dtypes of the merged leaves, as words."""
    leaves, _ = flatten_with_paths(params)
    return " and ".join(sorted({str(x.dtype) for path, x in leaves.items() if path in merged}))


def _report(errors: Mapping[str, float], dtype: str, mend: str) -> None:
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
            f"warning: {dtype} is too coarse for this update; {mend}",
            file=sys.stderr,
        )
