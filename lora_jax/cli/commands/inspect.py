"""`lora-jax inspect`: what an adapter file holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lora_jax.cli.jobs.spectrum import Spectrum
    from lora_jax.files.contained_factors import AdapterFile

EXAMPLES = (
    "lora-jax inspect my-adapter",
    "lora-jax inspect adapter.safetensors --all",
    "lora-jax inspect my-adapter --json > adapter.json",
)


def command(
    adapter: Annotated[
        Path, typer.Argument(help="A directory of PEFT or mlx-lm, or a file of lora_jax.")
    ],
    every: Annotated[
        bool, typer.Option("--all", help="A line for every module, not for every kind of module.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, for programs.")] = False,
) -> None:
    """Show what an adapter holds: ranks, targets, norms, the spectrum of its updates, its base.

    The base model is not needed: all is computed from A and B. With W for the base weight, the
    adapter adds ΔW = scale·A·B to it. The columns are the rank of A and B, the scale, the Frobenius
    norms |A|, |B| and |ΔW|, the stable rank of ΔW (its squared norm over its largest squared
    singular value), and how few singular directions hold 90 and 99 % of its squared norm.
    """
    from lora_jax.cli.jobs.spectrum import spectrum
    from lora_jax.files.contained_factors import read_factors

    file = read_factors(adapter)
    spectra = [spectrum(factors.a, factors.b, factors.scale) for factors in file.factors]
    if as_json:
        import json

        typer.echo(json.dumps(record(file, spectra), indent=2, allow_nan=False))
    else:
        from lora_jax.cli.jobs import inspect_table

        inspect_table.show(file, spectra, every=every)


def record(file: AdapterFile, spectra: list[Spectrum]) -> dict[str, Any]:
    """What `--json` prints; numbers that are not finite are null."""
    from lora_jax.files.kinds import DESCRIPTIONS

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
