"""Timestamps among the tokens of what is said: the rules that Whisper's decoding follows."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models.speech.cache import SpeechCache

#: Seconds between two timestamps, and states of the encoder between them.
PRECISION = 0.02


@dataclass(frozen=True)
class Timestamps:
    """Which tokens are timestamps, and which of them may come first.

    Attributes:
      first: the token of 0 seconds; the one before it says that there are none.
      end: the token that ends a transcript, `eos_token_id`.
      latest_start: how many steps of 0.02 seconds a transcript may begin late; None for any.
    """

    first: int
    end: int
    latest_start: int | None = None

    def mask(self, logits: jax.Array, cache: "TimedCache") -> jax.Array:
        """Return logits `[batch, length, vocabulary]`, -inf for what may not come next.

        A text begins with a timestamp; they come in pairs, the end of one part and the start of the
        next one, and never go back; and one is chosen where all together are likelier than any
        other token.
        """
        token = jnp.arange(logits.shape[-1])[None]
        is_time, begins = token >= self.first, cache.filled == cache.prompt
        last, before = cache.last[:, None], cache.before[:, None]
        least = cache.latest[:, None] + jnp.where(last & ~before, 0, 1)
        forbidden = (token == self.first - 1) | (last & before & is_time)
        forbidden |= last & ~before & (token < self.end)
        forbidden |= is_time & (token < least)
        late = self.first + (token.size if self.latest_start is None else self.latest_start)
        forbidden = jnp.where(begins, ~is_time | (token > late), forbidden)
        logits = jnp.where(forbidden[:, None], -jnp.inf, logits)
        logs = jax.nn.log_softmax(logits.astype(jnp.float32))
        times = jax.nn.logsumexp(jnp.where(is_time[None], logs, -jnp.inf), -1)
        texts = jnp.where(is_time[None], -jnp.inf, logs).max(-1)
        return jnp.where((times > texts)[..., None] & ~is_time[None], -jnp.inf, logits)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TimedCache(SpeechCache):
    """A cache that knows which of the last tokens were timestamps.

    Attributes:
      last, before: booleans `[batch]`, whether the last token was one, and the one before it.
      latest: int32 `[batch]`, the last timestamp so far, or one that is before all.
      prompt: the number of tokens in front of the transcript.
    """

    last: jax.Array
    before: jax.Array
    latest: jax.Array
    prompt: int = field(metadata={"static": True})

    @classmethod
    def begin(cls, cache: SpeechCache, rules: Timestamps, prompt: int) -> "TimedCache":
        """Return a cache before the first token."""
        rows = cache.segments.shape[0]
        return cls(
            *(cache.layers, cache.heard, cache.segments, cache.filled),
            last=jnp.zeros(rows, bool),
            before=jnp.ones(rows, bool),
            latest=jnp.full(rows, rules.first - 1, jnp.int32),
            prompt=prompt,
        )

    def after(self, cache: SpeechCache, ids: jax.Array, rules: Timestamps) -> "TimedCache":
        """Return `cache` with what the last of these tokens `[batch, length]` was."""
        token, count = ids[:, -1], cache.filled - self.prompt
        is_time = (token >= rules.first) & (count > 0)
        return TimedCache(
            *(cache.layers, cache.heard, cache.segments, cache.filled),
            last=is_time,
            before=jnp.where(count < 2, True, self.last),
            latest=jnp.where(is_time, token, self.latest),
            prompt=self.prompt,
        )

    def plain(self) -> SpeechCache:
        """Return the model's cache."""
        return SpeechCache(self.layers, self.heard, self.segments, self.filled)

    def row_axes(self) -> Any:
        """Return which axis of each array is the axis of rows, None where there is none."""
        axes = super().row_axes()
        places = (axes.layers, axes.heard, axes.segments, axes.filled)
        return TimedCache(*places, 0, 0, 0, self.prompt)  # type: ignore[arg-type]
