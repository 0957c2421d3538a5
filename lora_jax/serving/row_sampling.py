"""The next token of each row, with the temperature and the key of the request in it."""

import jax
import jax.numpy as jnp

from lora_jax.models.generation import nucleus
from lora_jax.serving.choosing import Controls
from lora_jax.serving.marks import Marks, penalized

#: Log-probabilities of other tokens that a request can ask for.
MOST_TOP = 20


def choose(
    logits: jax.Array, keys: jax.Array, steps: jax.Array, marks: Marks, controls: Controls
) -> jax.Array:
    """Return the next token of each row, that which `models.generate` chooses for it alone.

    Args:
      logits: `[rows, vocabulary]`.
      keys: PRNG keys `[rows]`.
      steps: int32 `[rows]`, how many tokens each row has already chosen.
      marks: of the rows.
      controls: of the rows.

    Returns:
      int32 `[rows]`.
    """
    temperature, wide = controls.temperature, logits.astype(jnp.float32)
    changes = (controls.presence, controls.frequency, controls.repetition)
    logits = jax.lax.cond(controls.changes, lambda: penalized(wide, marks, *changes), lambda: wide)
    greedy = logits.argmax(-1).astype(jnp.int32)

    def drawn() -> jax.Array:
        ranked, order = ranked_logits(logits, controls)
        folded = jax.vmap(jax.random.fold_in)(keys, steps)
        rank = jax.vmap(jax.random.categorical)(folded, ranked)
        return jnp.take_along_axis(order, rank[:, None], -1)[:, 0].astype(jnp.int32)

    sampled = jax.lax.cond((temperature > 0).any(), drawn, lambda: greedy)
    return jnp.where(temperature > 0, sampled, greedy)


def ranked_logits(logits: jax.Array, controls: Controls) -> tuple[jax.Array, jax.Array]:
    """Return what rows draw from: logits, the largest first, and the tokens that have them.

    They are divided by the temperature, and -inf for tokens that `top_k`, then `top_p`, then
    `min_p` leave out.

    Args:
      logits: float32 `[rows, vocabulary]`.
      controls: of the rows.

    Returns:
      float32 and int32 `[rows, vocabulary]`.
    """
    count = logits.shape[-1]
    divisor = jnp.where(controls.temperature > 0, controls.temperature, 1)
    ranked, order = jax.lax.top_k(logits / divisor[:, None], count)
    ranked = jnp.where(jnp.arange(count)[None] < controls.top_k[:, None], ranked, -jnp.inf)
    ranked = nucleus(ranked, controls.top_p[:, None])
    lowest = ranked[:, :1] + jnp.log(controls.min_p)[:, None]
    return jnp.where(ranked >= lowest, ranked, -jnp.inf), order


def log_probabilities(
    logits: jax.Array, tokens: jax.Array, top: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the log-probabilities of the chosen tokens, and of the likeliest ones.

    Args:
      logits: `[rows, vocabulary]`.
      tokens: int32 `[rows]`.
      top: boolean, whether the likeliest are asked for; zeros otherwise.

    Returns:
      float32 `[rows]`; float32 and int32 `[rows, MOST_TOP or vocabulary]`, the likeliest first.
    """
    wide = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(wide, axis=-1)
    own = jnp.take_along_axis(wide, tokens[:, None], -1)[:, 0] - total
    count = min(MOST_TOP, wide.shape[-1])
    none = jnp.zeros((len(wide), count), jnp.float32), jnp.zeros((len(wide), count), jnp.int32)

    def likeliest() -> tuple[jax.Array, jax.Array]:
        values, ids = jax.lax.top_k(wide, count)
        return values - total[:, None], ids.astype(jnp.int32)

    return own, *jax.lax.cond(top, likeliest, lambda: none)
