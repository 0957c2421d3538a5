"""What is said in recordings: greedy or sampled tokens of Whisper."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.engine.transform import lora
from lora_jax.models.generation import generate
from lora_jax.models.speech.timestamps import TimedCache, Timestamps


@dataclass(frozen=True)
class _Suppressing:
    """A model that never says some tokens: `apply(params, ids, segments, cache=cache)`."""

    apply: Callable[..., Any]
    never: tuple[int, ...]
    not_first: tuple[int, ...]
    timestamps: Timestamps | None = None

    def __call__(self, params: Any, ids: Any, segments: Any, cache: Any) -> Any:
        """Return the logits, -inf for tokens that are not said, and the cache."""
        rules, is_prompt = self.timestamps, cache.filled == 0
        plain = cache if rules is None else cache.plain()
        logits, after = lora(self.apply)(params, ids, segments, cache=plain)
        size = logits.shape[-1]
        silent = np.isin(np.arange(size), self.never)
        first = np.isin(np.arange(size), self.not_first)
        logits = jnp.where((silent | (is_prompt & first))[None, None], -jnp.inf, logits)
        if rules is None:
            return logits, after
        after = cache.after(after, ids, rules)
        return rules.mask(logits, after), after


def transcribe(
    apply: Callable[..., Any],
    params: Any,
    features: Any,
    prompt: Any,
    *,
    steps: int,
    stop: Collection[int] = (),
    suppress: Sequence[int] = (),
    begin_suppress: Sequence[int] = (),
    timestamps: Timestamps | None = None,
    **sampling: Any,
) -> np.ndarray:
    """Generate the tokens of what is said.

    Args:
      apply: `pretrained.apply` of a Whisper. Adapters in the parameters are applied.
      params: the model's parameters, perhaps with adapters.
      features: `[batch, frames, mel bins]`, as `log_mel` makes.
      prompt: integers `[length]` or `[batch, length]`: the tokens that say where a transcript
        begins, its language and its task, such as `<|startoftranscript|><|en|><|transcribe|>
        <|notimestamps|>`; `SpeechTokens.prompt` makes them.
      steps: maximum number of tokens.
      stop: tokens that end a transcript: `eos_token_id` in generation_config.json.
      suppress, begin_suppress: tokens that are never chosen, and those that are not chosen first:
        `suppress_tokens` and `begin_suppress_tokens` there.
      timestamps: the rules of timestamps, for a prompt without `<|notimestamps|>`.
      **sampling: `temperature`, `top_k`, `top_p` and `key` as in `generate`; greedy by default.

    Returns:
      int32 `[batch, at most steps]`, without the prompt.

    Raises:
      ValueError: the prompt is empty, prompt and steps do not fit into the model, or the features
        have another size.
    """
    features = jnp.asarray(features)
    ids = np.asarray(prompt, np.int32)
    ids = np.broadcast_to(ids, (len(features), ids.shape[-1]))
    if not ids.shape[1]:
        raise ValueError("prompt must have a token or more, got none")
    cache = _start(apply, params, features, ids.shape[1] + steps)
    if timestamps is not None:
        cache = TimedCache.begin(cache, timestamps, ids.shape[1])
    said = _Suppressing(apply, tuple(suppress), tuple(begin_suppress), timestamps)
    return generate(said, params, ids, cache, steps=steps, stop=stop, **sampling)


@partial(jax.jit, static_argnums=(0, 3))
def _start(apply: Callable[..., Any], params: Any, features: jax.Array, length: int) -> Any:
    start = lambda params, features: apply(params, features, length, method="start")
    return lora(start)(params, features)
