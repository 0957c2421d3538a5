"""A word where a configuration asks for dropout, and a gradient is computed without a key."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax

from lora_jax.core.weights import LoraWeight

#: Say it of the weight at this path, which has this rate.
Say = Callable[[str, float], None]


def say_once() -> Say:
    """Return a function that warns at its first call, and then no more."""
    said: list[str] = []

    def say(path: str, rate: float) -> None:
        if not said:
            said.append(path)
            warnings.warn(
                f"{path}: the configuration asks for dropout={rate:g}, but the parameters have no "
                "random key, so this gradient drops nothing. Inside the function that you "
                "differentiate write params = lora_jax.with_dropout(params, key), with a new key "
                "in each step; or leave dropout= out of the configuration",
                UserWarning,
                stacklevel=2,
            )

    return say


def watch(node: LoraWeight, path: str, say: Say) -> LoraWeight:
    """Return the node; where a gradient flows to its A although it should drop inputs, say so."""
    if not node.dropout or node.key is not None:
        return node
    return dataclasses.replace(node, a=_identity(say, path, node.dropout, node.a))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _identity(say: Say, path: str, rate: float, x: Any) -> Any:
    return x


@_identity.defjvp
def _identity_jvp(say: Say, path: str, rate: float, primals: Any, tangents: Any) -> Any:
    say(path, rate)
    return primals[0], tangents[0]
