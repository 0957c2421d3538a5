"""`lora_jax.models` Llama in `training.make_step`, on random weights: what is run by `train`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from benchmarks.accelerator.size import Size
from benchmarks.accelerator.timing import seconds_per_call
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.module import Decoder
from lora_jax.training import Optimizer, init_state, language_sums_of_frozen_head, make_step

#: Llama-3-8B.
LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
TARGETS = ["query", "key", "value", "output", "gate", "up", "down"]


def config(size: Size, shapes: str, remat: Any) -> DecoderConfig:
    """Return the configuration of "8B", or of "blocks" with the shapes of the table of blocks."""
    fields = dict(LLAMA_3_8B)
    if shapes == "blocks":
        fields |= {
            "vocab_size": 8 * size.width,
            "hidden_size": size.width,
            "intermediate_size": size.ffn,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.heads,
        }
    dtypes = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    return DecoderConfig(**fields, **dtypes, scan=shapes == "8B", remat=remat)


def time_model(
    size: Size, settings: DecoderConfig, rank: int, batch: int, length: int
) -> dict[str, Any]:
    """Return the figures of a training step on random tokens."""
    module = Decoder(settings)
    params = _random_params(module)
    apply = lambda params, ids, segments=None: module.apply({"params": params}, ids, segments)
    hidden = lambda params, ids, segments: module.apply({"params": params}, ids, method="hidden")
    loss = language_sums_of_frozen_head(hidden, lambda params: params["head"]["kernel"])
    ids = np.random.default_rng(0).integers(0, settings.vocab_size, (batch, length + 1), np.int32)
    rows = {
        "ids": jnp.asarray(ids),
        "segments": jnp.ones_like(ids),
        "weights": jnp.ones(ids.shape, jnp.float32),
    }
    found = lora_jax.LoraConfig(rank=rank, targets=TARGETS)
    adapted = lora_jax.init(jax.random.key(0), params, found, apply, rows["ids"][:, :8])
    base, adapters = lora_jax.split(adapted)
    tx = Optimizer(1e-4, warmup=0).transformation(adapters, 100)
    state, step = init_state(adapters, tx), make_step(loss, tx)

    def call() -> Any:
        nonlocal state
        state, measured = step(state, base, rows)
        return measured["loss"]

    seconds = seconds_per_call(call, size.repeats, size.steps)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    statistics = jax.local_devices()[0].memory_stats() or {}
    return {
        "ms": 1e3 * seconds,
        "tokens_per_second": batch * length / seconds,
        "TFLOP_per_second": 4 * count * batch * length / seconds / 1e12,
        "peak_GB_of_the_process": statistics.get("peak_bytes_in_use", math.nan) / 1e9,
        "parameters": count,
        "loss": float(call()),
    }


def _random_params(module: Decoder) -> Any:
    """Draw leaf by leaf on the device: norms of one, all else N(0, 1/in)."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
    leaves, treedef = jax.tree.flatten(shapes)
    stacked = module.config.scan
    made = []
    for i, leaf in enumerate(leaves):
        if len(leaf.shape) - (stacked and len(leaf.shape) > 1) < 2:
            made.append(jnp.ones(leaf.shape, leaf.dtype))
        else:
            made.append(_draw(jax.random.key(i), leaf.shape, leaf.dtype))
    return jax.tree.unflatten(treedef, made)


@jax.jit(static_argnums=(1, 2))
def _draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * jnp.asarray(shape[-2] ** -0.5, dtype)
