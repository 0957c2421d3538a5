"""What `lora-jax inspect` does: read an adapter, and print a table or JSON."""

import json
from pathlib import Path
from typing import Any

from lora_jax.cli.jobs import inspect_model, inspect_table
from lora_jax.cli.jobs.spectrum import Spectrum, spectrum
from lora_jax.core.foreign import shown
from lora_jax.files import kinds
from lora_jax.files.contained_factors import AdapterFile, read_factors
from lora_jax.files.kinds import DESCRIPTIONS


def run(adapter: Path, *, every: bool, as_json: bool) -> None:
    """Print what an adapter or a model contains; the arguments are the command's options.

    Raises:
      AdapterFileError, ModelFileError: it cannot be read.
    """
    if adapter.exists() and not kinds.of_run(adapter):
        found = kinds.detect(adapter)
        if found.kind in (kinds.CHECKPOINT, kinds.GGUF):
            inspect_model.run(found, as_json=as_json)
            return
    file = read_factors(adapter)
    spectra = [spectrum(factors.a, factors.b, factors.scale) for factors in file.factors]
    if as_json:
        print(json.dumps(_record(file, spectra), indent=2, allow_nan=False))
    else:
        inspect_table.show(file, spectra, every=every)
        best = kinds.of_run(adapter).get("best", file.path)
        if best != file.path:
            print(f"{shown(best)} has the lowest held-out loss of this run.")


def _record(file: AdapterFile, spectra: list[Spectrum]) -> dict[str, Any]:
    """Return what `--json` prints; numbers that are not finite are null."""
    return {
        "path": str(file.path),
        "kind": file.kind,
        "description": DESCRIPTIONS[file.kind],
        "base": file.base,
        "variant": file.variant,
        "targets": file.targets,
        "dtypes": file.dtypes,
        "parameters": file.parameters,
        "modules": [
            {
                "module": factors.module,
                "rank": factors.a.shape[1],
                "alpha": _finite(factors.alpha),
                "scale": _finite(factors.scale),
                "in": factors.a.shape[0],
                "out": factors.b.shape[1],
                "norm_a": _finite(found.norm_a),
                "norm_b": _finite(found.norm_b),
                "norm_update": _finite(found.norm),
                "stable_rank": _finite(found.stable_rank),
                "directions_90": found.directions(0.9),
                "directions_99": found.directions(0.99),
                "singular_values": [_finite(float(value)) for value in found.singular_values],
            }
            for factors, found in zip(file.factors, spectra, strict=True)
        ],
        "trained_whole": {name: list(shape) for name, shape in file.whole.items()},
    }


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
