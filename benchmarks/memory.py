"""Temporary memory and FLOPs, exact, by XLA: `python -m benchmarks.memory`.

For the gradient of the scanned and rematerialized model under several policies, written by hand and
with `lora`; and for `merge`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import lora_jax
from benchmarks import contenders
from benchmarks.contenders import Setting
from benchmarks.decoder import Size
from benchmarks.report import versions

POLICIES: dict[str, Callable] = {
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "lora_jax.save_sums": lora_jax.save_sums,
}


def figures(fn: Callable, *args: Any, **options: Any) -> tuple[float, float, float]:
    """Return temporary bytes, FLOPs and bytes accessed of a compiled function."""
    compiled = jax.jit(fn, **options).lower(*args).compile()
    cost = compiled.cost_analysis()
    return compiled.memory_analysis().temp_size_in_bytes, cost["flops"], cost["bytes accessed"]


def rematerialised() -> Table:
    """Measure the model with each policy, one row per policy."""
    setting = Setting(Size(), "scan_remat")
    base, adapters = lora_jax.split(contenders.adapted(setting))
    table = Table(title="gradient of the adapters, scan_remat (a loop's body counts once)")
    for heading in ("policy in the model", "by hand: MB", "GFLOP", "lora: MB", "GFLOP"):
        table.add_column(heading, justify="left" if "policy" in heading else "right")
    for name, policy in POLICIES.items():
        by_hand = contenders.loss_by_hand(setting, policy=policy)
        mine = contenders.loss_split(setting, policy=policy)
        cells = []
        for fn, args in (
            (by_hand, (setting.adapters(), setting.params(), setting.batch())),
            (mine, (adapters, base, setting.batch())),
        ):
            memory, flops, _ = figures(jax.grad(fn), *args)
            cells += [f"{memory / 1e6:.1f}", f"{flops / 1e9:.2f}"]
        table.add_row(name, *cells)
    return table


def merged(layers: int = 12, rows: int = 1024, columns: int = 1024, rank: int = 8) -> str:
    """Measure `merge` of one stacked weight, with a donated base, against a lower bound."""
    w = jax.ShapeDtypeStruct((layers, rows, columns), jnp.float32)
    config = lora_jax.LoraConfig(rank=rank, overrides={"w": {"layout": "bio"}})
    base, adapters = lora_jax.split(lora_jax.init(jax.random.key(0), {"w": w}, config))
    merge = lambda base, adapters: lora_jax.merge(lora_jax.join(base, adapters))
    memory, flops, moved = figures(merge, base, adapters, donate_argnums=0)
    # For one layer, as XLA counts a loop: 2·K·N·r and the sum; W read and written, A and B read.
    floor = 2 * rows * columns * rank + rows * columns
    least = 4 * (2 * rows * columns + rank * (rows + columns))
    return (
        f"merge of [{layers}, {rows}, {columns}] float32, rank {rank}, base donated: temporary "
        f"memory {memory / (4 * rows * columns):.2f} layers, FLOPs {flops / floor:.3f} and bytes "
        f"{moved / least:.2f} of the floor"
    )


def main() -> None:
    """Compile and print."""
    console = Console(width=max(Console().width, 100))  # rich assumes 80 columns in a pipe
    console.print(rematerialised())
    console.print(merged())
    console.print(versions())


if __name__ == "__main__":
    main()
