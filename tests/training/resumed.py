"""A training loop as a user writes one, which Orbax checkpoints and a later process continues.

    python -m tests.training.resumed split DIRECTORY 6
        continues from the last checkpoint, up to step 6

prints the loss of every step, to the bit.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import lora_jax

CONFIG = lora_jax.LoraConfig(
    rank=2,
    targets=["layers", "head"],
    train=["bias"],
    rows={"embedding": [1, 3]},
    dora=True,
    dropout=0.2,
    dtype=jnp.bfloat16,
)
X = jnp.arange(12) % 7
Y = jax.random.normal(jax.random.key(5), (12, 3))


def base() -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "embedding": jax.random.normal(keys[0], (7, 5), jnp.bfloat16),
        "layers": jax.random.normal(keys[1], (2, 5, 5), jnp.bfloat16),
        "head": jax.random.normal(keys[2], (5, 3)),
        "bias": jnp.zeros(3),
    }


def model(params: Any, x: jax.Array) -> jax.Array:
    x = params["embedding"][x]
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
    return x.astype(jnp.float32) @ params["head"] + params["bias"][None]


def start(form: str) -> tuple[Any, optax.GradientTransformation, dict[str, Any]]:
    """Return the frozen base (None in a joined tree), an optimizer, and the initial state."""
    params = jax.jit(lambda: lora_jax.init(jax.random.key(1), base(), CONFIG, model, X))()
    frozen, trained = lora_jax.split(params) if form == "split" else (None, params)
    tx = lora_jax.freeze(optax.adamw(1e-2), trained)
    state = {"params": trained, "opt": jax.jit(tx.init)(trained), "step": jnp.int32(0)}
    return frozen, tx, state | {"key": jax.random.key(2)}


def losses(
    frozen: Any, tx: optax.GradientTransformation, state: dict[str, Any], until: int
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield state and loss after each step."""

    def loss(params: Any, key: jax.Array) -> jax.Array:
        params = lora_jax.with_dropout(params, key)
        joined = params if frozen is None else lora_jax.join(frozen, params)
        return ((lora_jax.lora(model)(joined, X) - Y) ** 2).mean()

    @jax.jit
    def step(state: dict[str, Any]) -> tuple[dict[str, Any], jax.Array]:
        key, now = jax.random.split(state["key"])
        value, grads = jax.value_and_grad(loss)(state["params"], now)
        updates, opt = tx.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt": opt, "step": state["step"] + 1, "key": key}, value

    while int(state["step"]) < until:
        state, value = step(state)
        yield state, float(value).hex()


def manager(directory: Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        directory, options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    )


def restore(directory: Path, like: dict[str, Any]) -> dict[str, Any]:
    """Restore the last checkpoint, with the shapes and dtypes of a new run."""
    shapes = jax.eval_shape(lambda: like)
    with manager(directory) as checkpoints:
        return checkpoints.restore(checkpoints.latest_step(), args=ocp.args.StandardRestore(shapes))


if __name__ == "__main__":
    frozen, tx, fresh = start(sys.argv[1])
    for _, value in losses(frozen, tx, restore(Path(sys.argv[2]), fresh), int(sys.argv[3])):
        print(value)
