"""What `lora-jax merge` does: merge, copy the other files, report what rounding lost."""

import dataclasses
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

import lora_jax as lora
from lora_jax import models
from lora_jax.cli import sources
from lora_jax.cli.errors import OutputError
from lora_jax.cli.options import refuse_existing
from lora_jax.files import kinds
from lora_jax.files.disk.atomic import write_directory
from lora_jax.models import hf_directory

NOTABLE = 0.1  # fraction of an update lost in rounding that deserves a warning
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ot"),
    *(".index.json", "/config.json"),
)


def run(model: str, adapter: Path, out: Path, *, dtype: str | None, force: bool) -> None:
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
    loaded = sources.load(base, adapter)
    # every leaf: those without an adapter are rounded too
    params, errors = lora.merge(loaded.params, dtype, donate=True, return_error=True)
    if dtype is not None:
        params = jax.tree.map(lambda x: x.astype(dtype), params)
    merged = dataclasses.replace(loaded.model, params=params)
    beside = _beside(base)
    write_directory(out, beside | models.files(merged))
    name = str(jnp.result_type(*jax.tree.leaves(params)))
    print(f"wrote {out}: {len(errors)} merged weights in {name}, {len(beside)} other files")
    _report(errors, name)


def _beside(base: kinds.Found) -> dict[str, bytes]:
    """Return the tokenizer's files, and all others beside the weights."""
    if base.kind in (kinds.GGUF, kinds.TINY):
        return sources.tokenizer_of(base).files()
    return {
        file.name: file.read_bytes()
        for file in sorted(base.path.iterdir())
        if file.is_file() and not file.name.startswith(".")
        if not f"/{file.name}".endswith(_WEIGHTS)
    }


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
        f"{errors[worst]:.2g} ({worst})"
    )
    if errors[worst] > NOTABLE:
        print(
            f"warning: {dtype} is too coarse for this update; --dtype float32 keeps it",
            file=sys.stderr,
        )
