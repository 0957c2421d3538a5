"""A small model, and one run of it trained alone: the usual loop, written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lora
from tests.programs import normal

STEPS = 20

BASE = {
    "embed": normal(0, (10, 8), jnp.float32),
    "up": normal(1, (8, 16), jnp.float32),
    "down": normal(2, (16, 8), jnp.float32),
    "bias": jnp.zeros(8),
}
CONFIG = lora.LoraConfig(rank=3, targets=["up", "down"], train=["bias"])
SCHEDULE = optax.cosine_decay_schedule(1.0, 2 * STEPS)


def plain_loss(params, tokens, y):
    x = params["embed"][tokens]
    out = jnp.tanh(x @ params["up"]) @ params["down"] + params["bias"][None]
    return ((out - y) ** 2).mean()


LOSS = lora.lora(plain_loss)


def batches(seed=0, steps=STEPS):
    """A batch for each step."""
    rng = np.random.default_rng(seed)
    return [
        (jnp.asarray(rng.integers(0, 10, 12)), jnp.asarray(rng.normal(size=(12, 8)), jnp.float32))
        for _ in range(steps)
    ]


def train_alone(run, data, config=CONFIG, schedule=SCHEDULE, base=BASE):
    """(losses, overlay) of one run, with `init`, `freeze` and optax alone."""
    key = jax.random.key(run.seed)
    params = lora.init(key, base, run.config(config), plain_loss, *data[0])
    rate = lambda step: run.learning_rate * schedule(step)
    adamw = lambda rate: optax.adamw(rate, weight_decay=run.weight_decay)
    tx = lora.lora_plus(rate, params, run.b_ratio, adamw)
    if run.clip:
        tx = optax.chain(lora.freeze(optax.clip_by_global_norm(run.clip), params), tx)

    @jax.jit
    def step(params, state, number, *batch):
        def loss(params):
            key = jax.random.fold_in(jax.random.key(run.seed), number)
            return LOSS(lora.with_dropout(params, key), *batch)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return lora.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for number, batch in enumerate(data):
        params, state, value = step(params, state, number, *batch)
        losses.append(float(value))
    return np.array(losses), lora.split(params)[1]
