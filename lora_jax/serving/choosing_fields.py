"""Read from a request how its tokens are chosen."""

import dataclasses
import re
import secrets
from typing import Any

from lora_jax.core.checks import is_within
from lora_jax.core.foreign import shown_value
from lora_jax.serving.choosing import MOST_BIASED, Choosing
from lora_jax.serving.errors import RequestError
from lora_jax.serving.fields import LARGEST, Fields, wrong

#: OpenAI's fields, and those that vLLM and mlx-lm add to them.
CHOOSING_FIELDS = (
    *("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "logit_bias"),
    *("top_k", "min_p", "repetition_penalty"),
)
_HIGHEST_TEMPERATURE = 2.0
_LOWEST_TOP_P = 1e-9
_PENALTY, _REPETITION, _BIAS = 2.0, 100.0, 100.0
_TOKEN = re.compile(r"0|[1-9][0-9]{0,9}")


def read_choosing(fields: Fields, top: int, vocabulary: int) -> Choosing:
    """Return how the tokens of a request are chosen; without a seed, it is random.

    Args:
      fields: of the request.
      top: how many of the likeliest tokens it wants to see.
      vocabulary: the number of ids that the model has.

    Raises:
      RequestError: a field is wrong.
    """
    seed = fields.integer("seed", -LARGEST - 1, LARGEST, None)
    top_k = fields.integer("top_k", -1, LARGEST, None)
    return Choosing(
        temperature=fields.number("temperature", 0, _HIGHEST_TEMPERATURE, 1.0),
        top_p=max(_LOWEST_TOP_P, fields.number("top_p", 0, 1, 1.0)),
        seed=secrets.randbits(31) if seed is None else seed,
        top=top,
        top_k=max(top_k or 0, 0),
        min_p=fields.number("min_p", 0, 1, 0.0),
        presence=fields.number("presence_penalty", -_PENALTY, _PENALTY, 0.0),
        frequency=fields.number("frequency_penalty", -_PENALTY, _PENALTY, 0.0),
        repetition=fields.number("repetition_penalty", 1 / _REPETITION, _REPETITION, 1.0),
        bias=_read_bias(fields.value("logit_bias"), vocabulary),
    )


def with_seed(choosing: Choosing, number: int) -> Choosing:
    """Return how the choice with this number of one prompt is made: each has its own seed.

    >>> with_seed(Choosing(seed=5), 2).seed, with_seed(Choosing(seed=2**63 - 1), 1).seed
    (7, -9223372036854775808)
    """
    count = LARGEST + 1  # of the seeds from 0
    seed = (choosing.seed + number + count) % (2 * count) - count
    return dataclasses.replace(choosing, seed=seed)


def _read_bias(given: Any, vocabulary: int) -> tuple[tuple[int, float], ...]:
    """Return token ids and what is added to their logits."""
    if given is None:
        return ()
    if not isinstance(given, dict) or len(given) > MOST_BIASED:
        raise wrong(
            "logit_bias", f"an object of up to {MOST_BIASED:,} token ids and numbers", given
        )
    for token, value in given.items():
        if not _TOKEN.fullmatch(token) or int(token) >= vocabulary:
            raise RequestError(
                f"logit_bias: {shown_value(token)} is not a token id, which is an integer from 0 "
                f"to {vocabulary - 1} as a string",
                param="logit_bias",
            )
        if not is_within(value, -_BIAS, _BIAS):
            raise wrong(f"logit_bias[{token}]", f"a number from {-_BIAS:g} to {_BIAS:g}", value)
    return tuple((int(token), float(value)) for token, value in given.items())
