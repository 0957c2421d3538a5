"""Results of papers, reproduced with this library: a table, pictures, and results.jsonl.

`--markdown FILE` prints the table of a results.jsonl as in docs/benchmarks.md.
"""

import argparse
import dataclasses
import importlib
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.published.result import Result, Row, Unavailable
from benchmarks.report import versions

#: Modules of this package, in the order of the table; each has `run() -> Result`.
EXPERIMENTS = (
    "counts",
    "cost",
    "gradient_norms",
    "eckart_young",
    "learning_rates",
    "lora_plus",
    "pissa",
    "eva",
    "dora",
    "rank_and_rate",
    "tuned_variants",
    "optimizers",
)
HEADINGS = ("result", "setting", "published", "here", "agrees")


def run(name: str) -> Result:
    """Run one experiment; if it cannot run, return a row that says why."""
    try:
        return importlib.import_module(f"benchmarks.published.{name}").run()
    except Unavailable as error:
        return Result([Row(name, "", "", "", "", None, str(error))])


def link(source: str) -> str:
    """Return the address of an arXiv number or a DOI; an address stays as it is."""
    if not source or source.startswith("http"):
        return source
    return f"https://doi.org/{source}" if "/" in source else f"https://arxiv.org/abs/{source}"


def verdict(row: Mapping[str, Any]) -> str:
    """Return the last cell of a row: yes, no or not run, and why."""
    word = {True: "yes", False: "no", None: "not run"}[row["agrees"]]
    return f"{word}: {row['note']}" if row["note"] else word


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the table for docs/benchmarks.md."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
    for row in rows:
        what = f"[{row['what']}]({link(row['source'])})" if row["source"] else row["what"]
        cells = (what, row["setting"], row["published"], row["ours"], verdict(row))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Read the rows that a run wrote."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [line for line in lines if "what" in line]


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.published", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("published"), help="folder for files")
    parser.add_argument("--only", default="", help="names out of " + ",".join(EXPERIMENTS))
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="print a table, run nothing")
    return parser.parse_args()


def main() -> None:
    """Run, print and write."""
    args = arguments()
    if args.markdown:
        print(markdown(rows_of(args.markdown)))
        return
    names = args.only.split(",") if args.only else EXPERIMENTS
    if unknown := set(names) - set(EXPERIMENTS):
        raise SystemExit(f"no experiment {sorted(unknown)}; there are {', '.join(EXPERIMENTS)}")
    console = Console(width=max(Console().width, 140))
    made = Table(*HEADINGS, title="published results", caption=versions("flax", "optax"))
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "results.jsonl").open("w", encoding="utf-8") as file:
        for name in names:
            start = time.process_time()
            result = run(name)
            seconds = time.process_time() - start
            for row in result.rows:
                made.add_row(row.what, row.setting, row.published, row.ours, verdict(vars(row)))
                json.dump(dataclasses.asdict(row), file, ensure_ascii=False)
                file.write("\n")
            made.add_section()
            for picture in result.pictures:
                picture.write(args.out)
            console.print(f"{name}: {seconds:.0f} s of CPU time")
    console.print(made)
    console.print(f"wrote results.jsonl and the pictures to {args.out}/")


if __name__ == "__main__":
    main()
