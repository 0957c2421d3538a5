"""A small language model and a tokenizer for the tests of training."""

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from lora_jax.training.batching import Data, cut_stream
from lora_jax.training.loop import Job, Settings
from lora_jax.training.loss import language_sums
from lora_jax.training.optimizer import Optimizer

VOCABULARY, WIDTH = 17, 8


def params(seed=0, dtype=jnp.float32):
    shapes = {
        "embedding": (VOCABULARY, WIDTH),
        **dict.fromkeys(("query", "key", "value"), (WIDTH, WIDTH)),
        "head": (WIDTH, VOCABULARY),
    }
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=shape, scale=shape[0] ** -0.5), dtype)
        for name, shape in shapes.items()
    }


def hidden(params, ids, segments):
    """Apply one causal attention in which segments see only themselves."""
    x = params["embedding"][ids]
    q, k, v = (x @ params[name] for name in ("query", "key", "value"))
    same = segments[:, :, None] == segments[:, None, :]
    visible = same & jnp.tril(jnp.ones_like(same))
    scores = jnp.where(visible, jnp.einsum("bqd,bkd->bqk", q, k), -1e9)
    return x + jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores), v)


def head(params, x):
    return x @ params["head"]


def apply(params, ids, segments):
    return head(params, hidden(params, ids, segments))


def adapters(config=None, seed=0, dtype=jnp.float32):
    """Return a base and its adapters."""
    config = config or lora.LoraConfig(rank=2, targets=["query", "value", "head"], dtype=dtype)
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    full = lora.init(jax.random.key(seed), params(seed, dtype), config, apply, ids, ids)
    return lora.split(full)


def stream(n=120, seed=0) -> np.ndarray:
    """Return token ids that can be learned: most follow from the previous one."""
    rng = np.random.default_rng(seed)
    ids = [1]
    for _ in range(n - 1):
        ids.append((3 * ids[-1] + 1 + int(rng.random() < 0.1)) % VOCABULARY)
    return np.array(ids, np.int32)


def job(directory, steps=6, data: Data | None = None, held_out: Data | None = None, **settings):
    """Return a job for the model, and its initial adapters."""
    base, start = adapters()
    optimizer = Optimizer(3e-2, warmup=2)
    settings = Settings(steps=steps, **{"rows": 3, "seed": 5, **settings})
    return (
        Job(
            loss=language_sums(apply),
            base=base,
            tx=optimizer.transformation(start, steps),
            rates=optimizer.rates(steps),
            data=cut_stream(stream(), 9) if data is None else data,
            held_out=held_out,
            settings=settings,
            directory=directory,
        ),
        start,
    )


class Letters:
    """A tokenizer of single letters, with a = 3; its template renders a turn as <role>content|."""

    eos_id = 2

    def encode(self, text, special=False):
        ids = [3 + ord(letter) - ord("a") if letter.isalpha() else ord(letter) for letter in text]
        return [1, *ids] if special else ids

    def chat(self, messages, add_generation_prompt=False):
        turns = [f"<{m['role']}>{m['content']}|" for m in messages]
        return "".join(turns) + ("<assistant>" if add_generation_prompt else "")
