"""What `lora-jax inspect` says of a model: how its tensors are stored, and their bytes."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from lora_jax.core.foreign import shown
from lora_jax.files import kinds
from lora_jax.files.naming import codes_of
from lora_jax.models import hf_directory
from lora_jax.models.decoder import gguf
from lora_jax.models.weights import published


def run(model: kinds.Found, *, as_json: bool) -> None:
    """Print the formats of a model's tensors; only headers are read.

    Raises:
      ModelFileError: it is damaged, or its weights are quantized in an unknown way.
    """
    if model.kind == kinds.GGUF:
        tensors: Mapping[str, Any] = gguf.read_model(model.path)[1]
    else:
        settings = hf_directory.read_config(model.path)
        tensors = published.open_directory(model.path, settings).tensors
    formats = _formats(tensors)
    if as_json:
        about = {"path": str(model.path), "kind": model.kind, "formats": formats}
        print(json.dumps(about, indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("stored as", "tensors", "numbers", "bytes", "bits per number"):
        table.add_column(heading, justify="left" if heading == "stored as" else "right")
    for name, row in formats.items():
        bits = f"{8 * row['bytes'] / row['numbers']:.2f}"
        table.add_row(name, *(f"{row[x]:,}" for x in ("tensors", "numbers", "bytes")), bits)
    out = Console(highlight=False)
    description = kinds.DESCRIPTIONS[model.kind]
    out.print(f"{shown(str(model.path))}: {description}", markup=False, soft_wrap=True)
    out.print(table)


def _formats(tensors: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Return tensors, numbers and bytes by format, the largest first."""
    found: dict[str, dict[str, int]] = {}
    for tensor in tensors.values():
        name, size = _format(tensor)
        row = found.setdefault(name, {"tensors": 0, "numbers": 0, "bytes": 0})
        row["tensors"] += 1
        row["numbers"] += math.prod(tensor.shape)
        row["bytes"] += size
    return dict(sorted(found.items(), key=lambda item: -item[1]["bytes"]))


def _format(tensor: Any) -> tuple[str, int]:
    """Return the kind or the dtype of a tensor, and its bytes."""
    codes = codes_of(tensor)
    if codes is not None:
        return codes.kind, codes.nbytes
    if hasattr(tensor, "stored"):  # of a GGUF file, in a type without a kind here or as floats
        return tensor.kind, tensor.stored.nbytes
    dtype = np.dtype(tensor.dtype)
    return str(dtype), math.prod(tensor.shape) * dtype.itemsize
