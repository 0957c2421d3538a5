"""Optimizers of adapters at their best rates, on a small Shakespeare.

A decoder of characters (2 layers of width 64) reads Hamlet for a short while; then adapters of all
its kernels read King Lear, whose last tenth is held out. Each optimizer is one sweep over rates and
seeds. The papers: LoRA+ (https://arxiv.org/abs/2402.12354), scaled AdamW
(https://arxiv.org/abs/2402.02347), LoRA-RITE (https://arxiv.org/abs/2410.20625) and LoRA-Muon
(https://arxiv.org/abs/2606.12921), of which only the abstract was at hand: "a rank-2 proxy recovers
the dense best tested learning rate" in a compute-matched study of TinyShakespeare, and a run of
rank 32 has a lower mean validation loss than the dense baseline.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax
from benchmarks import decoder
from benchmarks.published import sweeps
from benchmarks.published.result import Line, Picture, Result, Row, Unavailable
from lora_jax.models import assets

SIZE = decoder.Size(layers=2, width=64, heads=4, vocabulary=0, batch=8, time=64)
COUNT, PRETRAINING, STEPS, SEEDS = 6, 500, 60, 2
NOT_THE_SAME = (
    "here adapters train beside frozen kernels, and a step of rank 2 moves 2 of 64 directions; how "
    "the paper's runs are set up was not at hand"
)
Optimizer = Callable[..., optax.GradientTransformation]


def riemannian(learning_rate: Any, params: Any) -> optax.GradientTransformation:
    """Return scaled Adam."""
    return lora_jax.riemannian(optax.adam(learning_rate), params)


def muon(learning_rate: Any, momentum: float = 0.95) -> optax.GradientTransformation:
    """Return what LoRA-Muon stands for: a step of spectral norm η of every stacked kernel."""

    def update(gradients: Any, averages: Any, params: Any = None) -> tuple[Any, Any]:
        decayed = lambda m, g: momentum * m + (1 - momentum) * g
        averages = jax.tree.map(decayed, averages, gradients)
        return jax.tree.map(lambda m: -learning_rate * sign(m), averages), averages

    return optax.GradientTransformation(lambda x: jax.tree.map(jnp.zeros_like, x), update)


def sign(x: jax.Array) -> jax.Array:
    """Set all singular values of matrices `[..., m, n]` to about 1, by Muon's polynomial."""
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.swapaxes(-1, -2)
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-12)
    for _ in range(5):
        square = x @ x.swapaxes(-1, -2)
        x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
    return x if wide else x.swapaxes(-1, -2)


@dataclasses.dataclass(frozen=True)
class Contender:
    """An optimizer with a rank, 0 for the dense kernels, and the first of its rates."""

    optimizer: Optimizer
    rank: int = 8
    first: float = 1e-3
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


CONTENDERS = {
    "Adam": Contender(optax.adam),
    "LoRA+": Contender(optax.adam, first=2.5e-4, fields={"b_ratio": 16.0}),
    "scaled Adam": Contender(riemannian),
    "LoRA-RITE": Contender(lora_jax.lora_rite),
    "Muon": Contender(muon, rank=0),
    "LoRA-Muon, r=2": Contender(lora_jax.lora_muon, rank=2, first=4e-3),
    "LoRA-Muon, r=8": Contender(lora_jax.lora_muon, rank=8, first=4e-3),
    "LoRA-Muon, r=32": Contender(lora_jax.lora_muon, rank=32, first=4e-3),
}


class Task:
    """The decoder, pre-trained on one play, and two parts of another."""

    def __init__(self, texts: Sequence[str], size: decoder.Size, steps: int):
        ids = {c: i for i, c in enumerate(sorted(set("".join(texts))))}
        first, second = (jnp.asarray([ids[c] for c in text], jnp.int32) for text in texts)
        cut = len(second) * 9 // 10
        rows = len(second[cut:]) // (size.time + 1)
        self.held_out = second[cut : cut + rows * (size.time + 1)].reshape(rows, -1)
        self.train, self.size = second[:cut], dataclasses.replace(size, vocabulary=len(ids))
        self.loss = functools.partial(decoder.loss, heads=size.heads, variant="scan")
        self.base = self._pretrained(first, steps)

    def _pretrained(self, ids: jax.Array, steps: int) -> Any:
        tx = optax.adam(3e-3)

        @jax.jit
        def run(params: Any) -> Any:
            def step(carry: Any, key: jax.Array) -> Any:
                params, state = carry
                grads = jax.grad(self.loss)(params, self.batch(ids, key))
                updates, state = tx.update(grads, state)
                return (optax.apply_updates(params, updates), state), None

            keys = jax.random.split(jax.random.key(0), steps)
            return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]

        return run(decoder.init(self.size, "scan"))

    def batch(self, ids: jax.Array, key: jax.Array) -> jax.Array:
        """Draw rows of ids `[batch, time + 1]`."""
        length = self.size.time + 1
        start = jax.random.randint(key, (self.size.batch,), 0, len(ids) - length)
        return ids[start[:, None] + jnp.arange(length)[None]]

    def losses(self, one: Contender, rates: Sequence[float], steps: int, seeds: int) -> np.ndarray:
        """Return held-out losses `[rates, seeds]` of one sweep."""
        kernels = list(decoder.ADAPTED)
        config = lora_jax.LoraConfig(rank=max(one.rank, 1), targets=kernels)
        if not one.rank:
            config = dataclasses.replace(config, targets=(), train=kernels)
        runs = lora_jax.grid(learning_rate=rates, seed=range(seeds), **one.fields)
        sweep = lora_jax.sweep(
            lora_jax.lora(self.loss),
            self.base,
            runs,
            config,
            self.held_out[: self.size.batch],
            optimizer=one.optimizer,
            batch_axes=0,
        )

        @jax.jit
        def trained(base: Any, state: Any) -> Any:
            def step(state: Any, number: jax.Array) -> Any:
                key = lambda seed: jax.random.fold_in(jax.random.key(seed), number)
                batch = jax.vmap(lambda seed: self.batch(self.train, key(seed)))(state.seed)
                return sweep.update(base, state, batch)[0], None

            return jax.lax.scan(step, state, jnp.arange(steps))[0]

        state = trained(self.base, sweep.init())
        return np.asarray(sweep.evaluate(state, self.held_out)).reshape(len(rates), seeds)


def plays() -> list[str]:
    """Return the texts to pre-train on and to tune on."""
    cache = assets.cache_directory()
    try:
        assets.fetch([assets.SHAKESPEARE], cache)
    except assets.AssetError as error:
        raise Unavailable(str(error)) from None
    folder = assets.SHAKESPEARE.directory(cache)
    return [(folder / f"{play}.txt").read_text("latin-1") for play in ("hamlet", "lear")]


@dataclasses.dataclass(frozen=True)
class Best:
    """What an optimizer reaches at its best rate; the seeds' batches are the same for all."""

    rate: float
    losses: np.ndarray  # [seeds]

    @classmethod
    def of(cls, losses: np.ndarray, rates: Sequence[float]) -> "Best":
        """Return the best of `[rates, seeds]` in the mean over seeds."""
        at = int(np.nanargmin(losses.mean(1)))
        return cls(rates[at], losses[at])

    def __str__(self) -> str:
        spread = self.losses.std(ddof=1)
        return f"{self.losses.mean():.4f} ± {spread:.4f} at {self.rate:.1e}"


# name -> (number of the paper, what it says, the other contender)
CLAIMS = {
    "LoRA+": ("2402.12354", "better than LoRA with Adam", "Adam"),
    "scaled Adam": ("2402.02347", "better than LoRA with Adam", "Adam"),
    "LoRA-RITE": ("2410.20625", "better than LoRA with Adam", "Adam"),
    "LoRA-Muon, r=32": ("2606.12921", "a lower mean loss than the dense baseline", "Muon"),
}


def better(
    setting: str, found: Mapping[str, Best], name: str, source: str, claim: str, other: str
) -> Row:
    """Compare two optimizers at their best rates; one is better if it is for every seed."""
    gains = found[other].losses - found[name].losses
    agrees = bool((gains > 0).all())
    return Row(
        f"{name} against {other}, each at its best rate",
        source,
        setting,
        claim,
        f"held-out loss {found[name]}; {other} {found[other]}; lower by {gains.mean():.4f}, for "
        f"{(gains > 0).sum()} of {gains.size} seeds",
        agrees,
        "" if agrees else "higher" if (gains < 0).all() else "no difference that seeds agree on",
    )


def same_rate(setting: str, found: Mapping[str, Best]) -> Row:
    """Compare LoRA-Muon's best rates with dense Muon's."""
    dense = found["Muon"].rate
    ratios = {
        name: best.rate / dense for name, best in found.items() if name.startswith("LoRA-Muon")
    }
    agrees = 0.5 <= ratios["LoRA-Muon, r=2"] <= 2
    return Row(
        "best rate of LoRA-Muon over that of dense Muon",
        "2606.12921",
        setting,
        "1 at r=2; the rate transfers across ranks",
        ", ".join(f"{ratio:.3g} ({name.rpartition('=')[2]})" for name, ratio in ratios.items())
        + f"; dense {found['Muon']}",
        agrees,
        "" if agrees else NOT_THE_SAME,
    )


def run(
    size: decoder.Size = SIZE,
    contenders: Mapping[str, Contender] = CONTENDERS,
    count: int = COUNT,
    pretraining: int = PRETRAINING,
    steps: int = STEPS,
    seeds: int = SEEDS,
) -> Result:
    """Measure all contenders, and compare each claim's two at their best rates."""
    with jax.numpy_rank_promotion("allow"):  # as users write a decoder
        task = Task(plays(), size, pretraining)
        rates = {name: sweeps.doubled(one.first, count) for name, one in contenders.items()}
        losses = {
            name: task.losses(one, rates[name], steps, seeds) for name, one in contenders.items()
        }
    found = {name: Best.of(values, rates[name]) for name, values in losses.items()}
    before = float(task.loss(task.base, task.held_out))
    setting = (
        f"decoder of characters, {size.layers} layers of width {size.width}, Hamlet then Lear "
        f"(held-out loss {before:.3f} before), r=8 unless said, α=r, {steps} steps of {size.batch} "
        f"× {size.time}, {count} rates in factors of 2, {seeds} seeds: a sweep of {count * seeds} "
        "each"
    )
    rows = [better(setting, found, name, *claim) for name, claim in CLAIMS.items()]
    rows.append(same_rate(setting, found))
    lines = [
        Line(name, rates[name], values.mean(1), "ks-" if name == "Muon" else "o-")
        for name, values in losses.items()
    ]
    title = "King Lear after Hamlet: held-out loss by optimizer"
    return Result(rows, [Picture("optimizers", title, "learning rate", "loss", lines, "x")])
