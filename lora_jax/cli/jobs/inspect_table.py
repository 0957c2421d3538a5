"""The tables of `lora-jax inspect`."""

import os
import re
import sys
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from lora_jax.cli.jobs.spectrum import Spectrum
from lora_jax.core.foreign import shown
from lora_jax.files.contained_factors import AdapterFile, ShownFactors
from lora_jax.files.kinds import DESCRIPTIONS

_HEADINGS = ("rank", "alpha", "scale", "|A|", "|B|", "|ΔW|", "σ₁", "stable rank", "90 %", "99 %")
_NARROW = ("rank", "scale", "|ΔW|", "90 %")  # what a narrow terminal has room for
PIPED_WIDTH = 160  # a pipe is not a screen: no table needs to be folded


def show(file: AdapterFile, spectra: list[Spectrum], *, every: bool) -> None:
    """Print the facts, and one line per module (`every`) or per kind of module."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    out = Console(width=PIPED_WIDTH if piped else None, highlight=False)
    table = _modules(file.factors, spectra, every, _HEADINGS)
    wide = Measurement.get(out, out.options.update(width=1000), table).maximum > out.width
    if wide:
        table = _modules(file.factors, spectra, every, _NARROW)
    out.print(_facts(file), table, sep="\n")
    if wide:
        out.print("A wider terminal shows more columns; --json shows all.")
    broken = [
        factors.module
        for factors, found in zip(file.factors, spectra, strict=True)
        if found.norm != found.norm
    ]
    if broken:
        out.print(f"[red]NaN or infinite values in {_safe(', '.join(broken))}[/red]")
    if "DoRA" in file.variant:
        out.print("ΔW is scale·A·B here, without the effect of DoRA's magnitudes.")


def _safe(text: str) -> str:
    """Return text of a file for a table: without control characters, and without markup."""
    return escape(shown(text, most=4096))


def _facts(file: AdapterFile) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    facts = {
        "file": str(file.path),
        "kind": f"{DESCRIPTIONS[file.kind]}: {file.variant}",
        "base": file.base or "not stated",
        "targets": ", ".join(file.targets) or "none",
        "matrices": f"{len(file.factors):,}",
        "parameters": f"{file.parameters:,} in {', '.join(file.dtypes) or 'no tensors'}",
    }
    if file.whole:
        facts["besides"] = _shorten(f"{name} {list(shape)}" for name, shape in file.whole.items())
    for name, value in facts.items():
        table.add_row(name, _safe(value))
    return table


def _modules(
    factors: list[ShownFactors], spectra: list[Spectrum], every: bool, headings: Sequence[str]
) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("module", overflow="fold")
    if not every:
        table.add_column("count", justify="right")
    for heading in headings:
        table.add_column(heading, justify="right")
    groups: dict[str, list[tuple[ShownFactors, Spectrum]]] = {}
    for one, found in zip(factors, spectra, strict=True):
        name = one.module if every else re.sub(r"(?<![^\W_])\d+(?![^\W_])", "*", one.module)
        groups.setdefault(name, []).append((one, found))
    for name, members in groups.items():
        count = [] if every else [str(len(members))]
        table.add_row(_safe(name), *count, *(_cells(members)[heading] for heading in headings))
    return table


def _cells(members: list[tuple[ShownFactors, Spectrum]]) -> dict[str, str]:
    """Return the cells of one group's line, by heading."""
    columns = [
        (one.a.shape[1], one.alpha, one.scale, s.norm_a, s.norm_b, s.norm, s.largest, s.stable_rank)
        + (s.directions(0.9), s.directions(0.99))
        for one, s in members
    ]
    ranges = map(_range, zip(*columns, strict=True))
    return dict(zip(_HEADINGS, ranges, strict=True))


def _range(values: Iterable[float]) -> str:
    """Show one number, or the smallest and the largest of several."""
    values = list(values)
    shown = [f"{value:.3g}" for value in (min(values), max(values))]
    return shown[0] if shown[0] == shown[1] else "–".join(shown)


def _shorten(items: Iterable[str], most: int = 4) -> str:
    items = list(items)
    more = f", and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
