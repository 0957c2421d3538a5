"""The next token of each row, with the temperature and the key of the request in it."""

import jax
import jax.numpy as jnp

from lora_jax.models.generation import draw

#: Log-probabilities of other tokens that a request can ask for.
MOST_TOP = 20


def choose(
    logits: jax.Array, keys: jax.Array, steps: jax.Array, temperature: jax.Array, top_p: jax.Array
) -> jax.Array:
    """Return the next token of each row, that which `models.generate` chooses for it alone.

    Args:
      logits: `[rows, vocabulary]`.
      keys: PRNG keys `[rows]`.
      steps: int32 `[rows]`, how many tokens each row has already chosen.
      temperature: float32 `[rows]`, 0 for greedy rows.
      top_p: float32 `[rows]`.

    Returns:
      int32 `[rows]`.
    """
    greedy = logits.argmax(-1).astype(jnp.int32)

    def one(
        row: jax.Array, key: jax.Array, step: jax.Array, t: jax.Array, p: jax.Array
    ) -> jax.Array:
        t = jnp.where(t > 0, t, 1)
        return draw(row[None], jax.random.fold_in(key, step), t, p, 0)[0]

    drawn = jax.lax.cond(
        (temperature > 0).any(),
        lambda: jax.vmap(one)(logits, keys, steps, temperature, top_p),
        lambda: greedy,
    )
    return jnp.where(temperature > 0, drawn, greedy)


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
