"""The tables of `lora-jax inspect`."""

import itertools
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence

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
#: What a terminal without room for all columns does without, the first first.
_LESS = ("σ₁", "|A|", "|B|", "alpha", "99 %", "stable rank", "scale")
#: The factors that one line is about.
_Group = list[tuple[ShownFactors, Spectrum]]
PIPED_WIDTH = 160  # a pipe is not a screen: no table needs to be folded


def show(file: AdapterFile, spectra: list[Spectrum], *, every: bool) -> None:
    """Print the facts, and one line per module (`every`) or per kind of module."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    out = Console(width=PIPED_WIDTH if piped else None, highlight=False)
    table, parent, left_out = _fitting_table(out, _groups(file.factors, spectra, every), every)
    out.print(_facts(file, parent), table, sep="\n")
    if left_out:
        out.print(f"A wider terminal also shows {', '.join(left_out)}; --json shows all.")
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


def _fitting_table(
    out: Console, groups: Mapping[str, _Group], every: bool
) -> tuple[Table, str, tuple[str, ...]]:
    """Return the table, what its names begin with where that is left out, and the columns left out.

    First the names become shorter, then the numbers rounder, then columns are left out.
    """
    wide = out.options.update(width=1000)
    parent = _common_parent(groups)
    forms = [("", 3, 0), (parent, 3, 0), *((parent, 2, n) for n in range(len(_LESS) + 1))]
    for start, digits, less in forms:
        headings = [heading for heading in _HEADINGS if heading not in _LESS[:less]]
        table = _modules(groups, every, headings, parent=start, digits=digits)
        if Measurement.get(out, wide, table).maximum <= out.width:
            break
    return table, start, _LESS[:less]


def _common_parent(names: Iterable[str]) -> str:
    """Return the whole segments that all names begin with; each keeps its last segment."""
    parents = [re.split(r"(?<=[./])", name)[:-1] for name in names]
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*parents, strict=False))
    return "".join(parts[0] for parts in same)


def _facts(file: AdapterFile, parent: str) -> Table:
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
    if parent:
        facts["modules"] = f"in {parent}"
    if file.whole:
        facts["besides"] = _shorten(f"{name} {list(shape)}" for name, shape in file.whole.items())
    for name, value in facts.items():
        table.add_row(name, _safe(value))
    return table


def _groups(factors: list[ShownFactors], spectra: list[Spectrum], every: bool) -> dict[str, _Group]:
    """Return the factors by the name that their line has."""
    groups: dict[str, _Group] = {}
    for one, found in zip(factors, spectra, strict=True):
        name = one.module if every else re.sub(r"(?<![^\W_])\d+(?![^\W_])", "*", one.module)
        groups.setdefault(name, []).append((one, found))
    return groups


def _modules(
    groups: Mapping[str, _Group],
    every: bool,
    headings: Sequence[str],
    *,
    parent: str = "",
    digits: int = 3,
) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=bool(parent))
    table.add_column("module", overflow="fold")
    if not every:
        table.add_column("count", justify="right")
    for heading in headings:
        lines = heading.replace(" r", "\nr") if digits < 3 else heading  # "stable rank"
        table.add_column(lines, justify="right")
    for name, members in groups.items():
        count = [] if every else [str(len(members))]
        cells = _cells(members, digits)
        own = _safe(name.removeprefix(parent))
        table.add_row(own, *count, *(cells[heading] for heading in headings))
    return table


def _cells(members: _Group, digits: int) -> dict[str, str]:
    """Return the cells of one group's line, by heading."""
    columns = [
        (one.a.shape[1], one.alpha, one.scale, s.norm_a, s.norm_b, s.norm, s.largest, s.stable_rank)
        + (s.directions(0.9), s.directions(0.99))
        for one, s in members
    ]
    ranges = (_range(values, digits) for values in zip(*columns, strict=True))
    return dict(zip(_HEADINGS, ranges, strict=True))


def _range(values: Sequence[float], digits: int) -> str:
    """Show one number, or the smallest and the largest of several, with fewer digits if need be."""
    if min(values) == max(values):
        return f"{values[0]:.3g}"
    ends = [_short(value, digits) for value in (min(values), max(values))]
    return ends[0] if ends[0] == ends[1] else "–".join(ends)


def _short(value: float, digits: int) -> str:
    """Return a number with this many digits, but whole numbers below 1,000 in full."""
    if float(value).is_integer() and abs(value) < 1000:
        return f"{value:.0f}"
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.3g}"


def _shorten(items: Iterable[str], most: int = 4) -> str:
    items = list(items)
    more = f", and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
