"""Rows of one batch that use different adapters against rows that share one, and the plain base.

SmolLM2 in float32 with adapters of rank 16 on q and v, unrolled. Times are of `models.stream`: the
first token of a prompt and each further one, all contenders in turn.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import lora_jax as lora
from benchmarks.measure import WARM_UP, in_turn, median
from benchmarks.report import ratio, versions
from lora_jax import models
from lora_jax.models import assets

BATCHES = (8, 64)
PROMPT, CACHE = 32, 128  # tokens
CONFIG = lora.LoraConfig(rank=16, targets=["query/kernel", "value/kernel"])
BASE, ONE, MANY = "base", "one adapter", "one per row"


@dataclasses.dataclass(frozen=True)
class Contender:
    """A batch of prompts with adapters."""

    model: models.Pretrained
    apply: Callable[..., Any]
    params: Any
    rows: int
    slots: np.ndarray | None = None

    def stream(self, steps: int) -> Iterator[np.ndarray]:
        """Return the tokens that follow the prompts."""
        prompts = np.arange(self.rows * PROMPT).reshape(self.rows, PROMPT) % 40_000
        cache = self.model.module.init_cache(self.rows, CACHE)
        options = {"steps": steps, "adapters_of": self.slots}
        return models.stream(self.apply, self.params, prompts, cache, **options)

    def flops(self) -> float:
        """Return XLA's operations for the prompts."""
        run = self.apply
        if self.slots is not None:
            run = lora.lora(run, adapters_of=self.slots)
        ids = jnp.zeros((self.rows, PROMPT), jnp.int32)
        return jax.jit(run).lower(self.params, ids).compile().cost_analysis()["flops"]


def contenders(model: models.Pretrained, rows: int) -> dict[str, Contender]:
    """Return the plain base, rows of one adapter, and rows of as many adapters."""
    ids = jnp.ones((1, 8), jnp.int32)

    @jax.jit
    def overlay(key: jax.Array) -> Any:
        made = lora.init(key, model.params, CONFIG, model.apply, ids)
        return jax.tree.map(lambda x: x + 0.01 if x.ndim > 1 else x, lora.split(made)[1])

    made = [overlay(key) for key in jax.random.split(jax.random.key(0), rows)]
    one, many = (lora.join(model.params, x) for x in (made[0], lora.stack(made)))
    return {
        BASE: Contender(model, model.apply, model.params, rows),
        ONE: Contender(model, lora.lora(model.apply), one, rows),
        MANY: Contender(model, model.apply, many, rows, np.arange(rows)),
    }


def timed(call: Callable[[], Any]) -> float:
    """Return the seconds of a call that returns when its result is there."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def times(found: dict[str, Contender], rounds: int) -> tuple[dict[str, list], dict[str, list]]:
    """Return the seconds of the first token and of a further one, by contender."""
    first = in_turn(
        [lambda x=x: timed(lambda: next(x.stream(1))) for x in found.values()], rounds, warm_up=1
    )
    further = 3 * rounds
    streams = [x.stream(1 + WARM_UP + further) for x in found.values()]
    for stream in streams:
        next(stream)
    later = in_turn([lambda x=x: timed(lambda: next(x)) for x in streams], further)
    return dict(zip(found, first, strict=True)), dict(zip(found, later, strict=True))


def main(console: Console, rounds: int) -> None:
    """Measure and print the table."""
    cache = assets.cache_directory()
    assets.fetch((assets.SMOLLM2,), cache)
    (name,) = assets.SMOLLM2.members
    model = models.load(assets.SMOLLM2.directory(cache) / name)
    table = Table(title=f"SmolLM2, rank {CONFIG.rank} on q and v, {PROMPT} tokens of prompt")
    headings = ("rows", "", "prompt, GFLOP", "× base", "ms", "× one", "token, ms", "× one")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    for rows in BATCHES:
        found = contenders(model, rows)
        first, later = times(found, rounds)
        flops = {key: x.flops() for key, x in found.items()}
        for key in found:
            prompt = [f"{flops[key] / 1e9:.1f}", f"{flops[key] / flops[BASE]:.3f}"]
            cells = [
                cell
                for seconds in (first, later)
                for cell in (
                    f"{1e3 * median(seconds[key]):.1f}",
                    ratio(seconds[key], seconds[ONE]),
                )
            ]
            table.add_row(str(rows), key, *prompt, *cells)
        del found
    table.caption = f"{versions()}, median of {rounds} prompts and {3 * rounds} tokens"
    console.print(table)
