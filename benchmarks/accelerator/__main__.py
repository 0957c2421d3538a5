"""Measure what the adapters cost on this device; print tables, and write them as JSON.

A row that fails shows its error, and the others go on. After `--seconds` no row is started.
"""

import argparse
import dataclasses
import datetime
import gc
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any

# PEFT's process needs memory of the same device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax

from benchmarks.accelerator.size import SIZES, Size
from benchmarks.accelerator.tables import TABLES
from benchmarks.report import versions


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerator", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--only", default=",".join(TABLES), help="tables (default: all of them)")
    parser.add_argument("--seconds", type=float, default=480, help="for all tables (default 480)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("accelerator.json"))
    args = parser.parse_args(given)
    args.only = args.only.split(",")
    if unknown := sorted(set(args.only) - set(TABLES)):
        parser.error(f"--only: no table {unknown}; there are {', '.join(TABLES)}")
    return args


def main(given: list[str] | None = None) -> None:
    """Measure, print and write."""
    args = arguments(given)
    end = time.monotonic() + args.seconds
    if args.size == "small":  # whose times mean nothing: it shows that everything runs
        jax.config.update("jax_disable_most_optimizations", True)
    device = jax.local_devices()[0]
    results: dict[str, Any] = {
        "device": f"{device.device_kind} ({device.platform})",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": versions("flax", "optax", "torch", "peft"),
        "size": vars(SIZES[args.size]),
        "tables": {},
    }
    print(f"{results['device']}, {results['date']}, {results['versions']}\n{results['size']}")
    for name in args.only:
        rows = results["tables"][name] = {}
        for row, figures in measure(name, dataclasses.replace(SIZES[args.size], end=end), end):
            rows[row] = figures
            args.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(f"\nwritten to {args.out}")


def measure(table: str, size: Size, end: float) -> Iterable[tuple[str, dict[str, Any]]]:
    """Print the rows of a table as they are measured, and yield them."""
    print(f"\n{table}: {(TABLES[table].__doc__ or '').strip()}", flush=True)
    floor = None
    for name, run in TABLES[table](size):
        figures = _measured(run) if time.monotonic() < end else {"error": "no time was left"}
        if "ms" in figures:
            if name.startswith("floor"):
                floor = floor or figures["ms"]
            if floor:
                figures["over_the_floor"] = figures["ms"] / floor
        print(f"  {name:48s} {_shown(figures)}", flush=True)
        yield name, figures


def _measured(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a row, or its error; give back the memory that it took."""
    try:
        return run()
    except Exception as error:  # whatever it is, the other rows are worth having
        lines = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[0][:300]}"}
    finally:
        gc.collect()
        jax.clear_caches()


def _shown(figures: dict[str, Any]) -> str:
    if "error" in figures:
        return figures["error"]
    return "  ".join(
        f"{name} {value:.3f}" if name == "over_the_floor" else f"{name} {value:,.4g}"
        for name, value in figures.items()
        if value is not None
    )


if __name__ == "__main__":
    main()
