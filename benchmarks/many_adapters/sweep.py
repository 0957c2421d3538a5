"""A step of 8 runs in one sweep against 8 single runs: time, compilation and operations.

The runs have ranks 4 to 64 and rates over a decade. All contenders take their steps in turn. XLA
counts the operations of a loop's body once, so those of `at_once` are left out.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import lora_jax as lora
from benchmarks.decoder import ADAPTED
from benchmarks.decoder import Size as DecoderSize
from benchmarks.decoder import init as decoder_init
from benchmarks.decoder import loss as decoder_loss
from benchmarks.measure import in_turn, median
from benchmarks.report import ratio, versions
from lora_jax.models import assets

RANKS, RATES = (4, 8, 32, 64), (1e-4, 1e-3)
RUNS = lora.grid(rank=list(RANKS), learning_rate=list(RATES))
SWEEPS: dict[str, dict[str, Any]] = {
    "padded": {},
    "buckets=[8]": {"buckets": [8]},
    "buckets=[8], at_once=1": {"buckets": [8], "at_once": 1},
}
STEPS = 100  # of a run whose whole time is compared, compilation included


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and the tokens of a batch that every run sees."""

    name: str
    base: Any
    loss: Callable[..., jax.Array]  # of the plain model
    targets: Sequence[str]
    tokens: jax.Array  # [rows, time + 1]


def of_decoder(rows: int, length: int) -> Case:
    """Return the decoder of the benchmarks, unrolled."""
    size = DecoderSize(batch=rows, time=length)
    loss = lambda params, tokens: decoder_loss(params, tokens, size.heads, "unrolled")
    tokens = _tokens(rows, length, size.vocabulary)
    return Case("decoder", decoder_init(size, "unrolled"), loss, ADAPTED, tokens)


def of_smollm2(rows: int, length: int) -> Case:
    """Return SmolLM2 with 135 million parameters in float32, its layers scanned."""
    from lora_jax import models

    cache = assets.cache_directory()
    assets.fetch((assets.SMOLLM2,), cache)
    (name,) = assets.SMOLLM2.members
    model = models.load(assets.SMOLLM2.directory(cache) / name, scan=True)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits = model.apply(params, tokens[:, :-1])
        picked = jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
        return (jax.nn.logsumexp(logits, -1) - picked).mean()

    targets = [f"{x}/kernel" for x in ("query", "key", "value", "output", "gate", "up", "down")]
    return Case("SmolLM2", model.params, loss, targets, _tokens(rows, length, 49_000))


def _tokens(rows: int, length: int, vocabulary: int) -> jax.Array:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(0, vocabulary, (rows, length + 1), np.int32))


#: How to make each case: a model, rows and tokens per row.
CASES = (
    (of_decoder, 1, 32),
    (of_decoder, 1, 128),
    (of_decoder, 4, 128),
    (of_smollm2, 1, 32),
    (of_smollm2, 1, 128),
)


class Alone:
    """All runs, each with its own compiled step; runs of one rank share a compilation here."""

    def __init__(self, case: Case):
        self.compile_seconds = self.flops = 0.0
        self.steps: list[Callable[[], float]] = []
        for rank in RANKS:
            config = lora.LoraConfig(rank=rank, targets=case.targets)
            params = lora.init(jax.random.key(0), case.base, config, case.loss, case.tokens)
            base, adapters = lora.split(params)
            for rate in RATES:
                tx = lora.freeze(optax.adamw(rate, weight_decay=0.0), adapters)
                state = jax.tree.map(jnp.copy, (adapters, tx.init(adapters)))
                if rate == RATES[0]:
                    start = time.perf_counter()
                    step = jax.jit(_single_step(case.loss, tx), donate_argnums=0)
                    compiled = step.lower(state, base, case.tokens).compile()
                    self.compile_seconds += len(RATES) * (time.perf_counter() - start)
                    self.flops += len(RATES) * compiled.cost_analysis()["flops"]
                self.steps.append(_stepper(compiled, state, base, case.tokens))

    def __call__(self) -> float:
        """Take a step of every run, one after another, and return the seconds."""
        start = time.perf_counter()
        for step in self.steps:
            step()
        return time.perf_counter() - start


def _single_step(loss: Callable[..., Any], tx: optax.GradientTransformation) -> Callable[..., Any]:
    def step(state: Any, base: Any, tokens: jax.Array) -> Any:
        adapters, moments = state
        of_adapters = lambda adapters: lora.lora(loss)(lora.join(base, adapters), tokens)
        value, gradients = jax.value_and_grad(of_adapters)(adapters)
        updates, moments = tx.update(gradients, moments, adapters)
        return (lora.apply_updates(adapters, updates), moments), value

    return step


def _stepper(compiled: Callable[..., Any], state: Any, *others: Any) -> Callable[[], Any]:
    states = [state]

    def step() -> Any:
        states[0], value = compiled(states[0], *others)
        return jax.block_until_ready(value)

    return step


class Together:
    """All runs in one sweep."""

    def __init__(self, case: Case, **options: Any):
        config = lora.LoraConfig(targets=case.targets)
        loss = lora.lora(case.loss)
        sweep = lora.sweep(loss, case.base, RUNS, config, case.tokens, **options)
        state = sweep.init()
        start = time.perf_counter()
        step = jax.jit(
            lambda state, base, tokens: sweep.update(base, state, tokens), donate_argnums=0
        )
        compiled = step.lower(state, case.base, case.tokens).compile()
        self.compile_seconds = time.perf_counter() - start
        self.flops = compiled.cost_analysis()["flops"]
        self.step = _stepper(compiled, state, case.base, case.tokens)

    def __call__(self) -> float:
        """Take a step, and return the seconds."""
        start = time.perf_counter()
        self.step()
        return time.perf_counter() - start


def main(console: Console, rounds: int) -> None:
    """Measure every case and print the table."""
    table = Table(
        title=f"{len(RUNS)} runs, ranks {RANKS[0]} to {RANKS[-1]}: one sweep / single runs, "
        f"median of {rounds} rounds",
        caption=versions("optax"),
    )
    for heading in ("model", "tokens", "sweep"):
        table.add_column(heading)
    names = ("ms alone", "ms", "step", "compile s alone", "compile s", f"{STEPS} steps and compile")
    for heading in (*names, "FLOPs"):
        table.add_column(heading, justify="right")
    for make, rows, length in CASES:
        _measure(table, make(rows, length), rounds)
    console.print(table)


def _measure(table: Table, case: Case, rounds: int) -> None:
    alone = Alone(case)
    sweeps = {name: Together(case, **options) for name, options in SWEEPS.items()}
    of_alone, *of_sweeps = in_turn([alone, *sweeps.values()], rounds, warm_up=1)
    rows, length = case.tokens.shape
    for (name, sweep), seconds in zip(sweeps.items(), of_sweeps, strict=True):
        whole = [
            (STEPS * mine + sweep.compile_seconds) / (STEPS * others + alone.compile_seconds)
            for mine, others in zip(seconds, of_alone, strict=True)
        ]
        table.add_row(
            case.name,
            f"{rows} × {length - 1}",
            name,
            f"{1e3 * median(of_alone):.0f}",
            f"{1e3 * median(seconds):.0f}",
            ratio(seconds, of_alone),
            f"{alone.compile_seconds:.1f}",
            f"{sweep.compile_seconds:.1f}",
            f"{median(whole):.2f}",
            "" if "at_once" in SWEEPS[name] else f"{sweep.flops / alone.flops:.3f}",
        )
