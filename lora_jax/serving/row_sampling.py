"""The next token of each row, with the temperature and the key of the request in it."""

import jax
import jax.numpy as jnp

from lora_jax.models.sampling import likeliest
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

    def draw() -> jax.Array:
        folded = jax.vmap(jax.random.fold_in)(keys, steps)
        return jax.vmap(jax.random.categorical)(folded, left(logits, controls)).astype(jnp.int32)

    drawn = jax.lax.cond((temperature > 0).any(), draw, lambda: greedy)
    return jnp.where(temperature > 0, drawn, greedy)


def left(logits: jax.Array, controls: Controls) -> jax.Array:
    """Return what rows draw from.

    It is the logits divided by the temperature, and -inf for tokens that `top_k`, then `top_p`,
    then `min_p` leave out.

    Args:
      logits: float32 `[rows, vocabulary]`.
      controls: of the rows.

    Returns:
      float32 `[rows, vocabulary]`.
    """
    divided = logits / jnp.where(controls.temperature > 0, controls.temperature, 1)[:, None]
    restricts = (controls.top_k < logits.shape[-1]) | (controls.top_p < 1)
    found = jax.lax.cond(
        restricts.any(),
        lambda: likeliest(divided, controls.top_k, controls.top_p),
        lambda: divided,
    )
    lowest = divided.max(-1, keepdims=True) + jnp.log(controls.min_p)[:, None]
    return jnp.where(found >= lowest, found, -jnp.inf)


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
