"""`Served`: a name that requests give as their model, and what it stands for."""

import time
from dataclasses import dataclass, field

from lora_jax.models.text.tokenizer import Tokenizer
from lora_jax.serving.rows import BASE


@dataclass(frozen=True)
class Served:
    """The base, or an adapter on it.

    Attributes:
      name: what a request's `model` field says.
      tokenizer: of the base, or the adapter's own.
      ends: token ids that end a text.
      slot: of the adapter in the stack; `BASE` for the plain base.
      created: when it was loaded, in seconds since 1970.
    """

    name: str
    tokenizer: Tokenizer
    ends: frozenset[int]
    slot: int = BASE
    created: int = field(default_factory=lambda: int(time.time()))
