"""What `lora-jax merge` does: merge leaf by leaf, copy other files, report what rounding lost."""

import dataclasses
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax

from lora_jax import models
from lora_jax.adapters.merge import check_finite
from lora_jax.cli import classifiers, sources
from lora_jax.cli.errors import OutputError
from lora_jax.cli.fit import Fit
from lora_jax.cli.jobs.merge_leaves import Merges
from lora_jax.cli.options import refuse_existing
from lora_jax.core.foreign import escaped, shown
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.tree import adapted_nodes
from lora_jax.core.weights import is_adapted, require_whole
from lora_jax.files import kinds
from lora_jax.files.disk.atomic import Content, write_directory
from lora_jax.files.naming import Naming
from lora_jax.models import hf_directory, published_classifier, saving
from lora_jax.models.own_files import read_own_files, read_tokenizer_files
from lora_jax.models.stops import GENERATION_CONFIG
from lora_jax.models.weights.sizes import MAX_SHARD_SIZE, parse_size

NOTABLE = 0.1  # fraction of an update lost in rounding that deserves a warning


def run(
    model: str,
    adapter: Path,
    out: Path,
    *,
    dtype: str | None,
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
    if out.exists() and base.path.exists() and out.samefile(base.path):
        raise OutputError(
            f"{out}: is the base model itself, which is never changed; choose another --out"
        )
    refuse_existing(out, force)
    parse_size(max_shard_size)
    is_classifier = bool(classifiers.find(base, adapter))
    load = _classifier if is_classifier else _language_model
    merges = Merges(dtype)
    merged = load(base, adapter, merges, fit)
    beside = _beside(base, adapter)
    stored: Mapping[str, hf_directory.StoredTensor] | None = None
    if dtype is None and base.kind == kinds.CHECKPOINT:
        stored = hf_directory.tensors(base.path)
        if is_classifier:
            stored = published_classifier.renamed(merged.kind, stored)
    files = saving.streamed_files(merged, stored, max_shard_size)
    if others := hf_directory.other_weights(out, files):
        raise OutputError(
            f"{out}: contains a model in other files ({shown(others[0])}), which would remain; "
            "choose another --out"
        )
    _write(out, beside, files, merges)
    errors = {path.removeprefix("encoder/"): error for path, error in merges.errors().items()}
    name = _dtypes(merged.params, errors)
    place = escaped(str(out))
    print(f"wrote {place}: {len(errors)} merged weights in {name}, {len(beside)} other files")
    _report(errors, name)


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
    if loaded.pooling != published_classifier.FAMILIES[loaded.model.kind].pooling:
        raise OutputError(
            f"{adapter}: its head reads the mean over a text's tokens, which no classifier of "
            "transformers does; use it with 'lora-jax predict', or train with --pooling model"
        )
    naming = published_classifier.naming_of_classifier(loaded.model.kind)
    params = _merged(loaded.params, naming, merges)
    pad_id = sources.pad_id_of(base, adapter)
    return published_classifier.published(loaded.model, params, loaded.labels, pad_id)


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
