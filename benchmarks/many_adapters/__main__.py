"""The tables of many adapters: `python -m benchmarks.many_adapters --help`."""

import argparse
import importlib

from rich.console import Console

#: The module of each table, which has a `main(console, rounds)`.
TABLES = {
    "sweep": "benchmarks.many_adapters.sweep",
    "serving": "benchmarks.many_adapters.serving",
}


def main() -> None:
    """Measure and print the tables that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_adapters", description=__doc__)
    parser.add_argument("--only", choices=TABLES, help="one table (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    args = parser.parse_args()
    console = Console(width=max(Console().width, 124))  # rich assumes 80 columns in a pipe
    for name in [args.only] if args.only else TABLES:
        importlib.import_module(TABLES[name]).main(console, args.rounds)


if __name__ == "__main__":
    main()
