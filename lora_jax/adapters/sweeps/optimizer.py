"""The optimizer of one slot, whose numbers are arrays."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.adapters.optim import freeze
from lora_jax.adapters.sweeps.run import Run
from lora_jax.core.errors import ConfigError
from lora_jax.core.tree import map_adapted
from lora_jax.core.weights import Adapted, LoraWeight

#: Makes a transformation: `(learning_rate, weight_decay=..., **options)`, or with `params` in the
#: second place, as `lora_rite` has them.
Make = Callable[..., optax.GradientTransformation]

_OURS = ("learning_rate", "b_ratio", "clip")


def numbers_of(run: Run, make: Make) -> dict[str, float]:
    """Return the numbers of a run that its optimizer uses.

    Raises:
      ConfigError: the run has numbers that the optimizer does not take.
    """
    numbers = {name: getattr(run, name) for name in _OURS}
    given = dict(run.options)
    if _takes(make, "weight_decay"):
        given["weight_decay"] = run.weight_decay
    elif run.weight_decay:
        given |= {"weight_decay": run.weight_decay}
    refused = [name for name in given if not _takes(make, name)]
    reserved = [name for name in run.options if name in (*_OURS, "weight_decay")]
    if refused:
        raise ConfigError(
            f"sweep: the optimizer {getattr(make, '__name__', make)} takes no {refused[0]}; pass "
            "optimizer=, a function (learning_rate, weight_decay, ...) -> transformation"
        )
    if reserved:
        raise ConfigError(f"sweep: {reserved[0]} is a field of Run, not one of its options")
    return numbers | given


def _takes(make: Make, name: str) -> bool:
    parameters = inspect.signature(make).parameters.values()
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)


def check_same_numbers(runs: Sequence[Run]) -> None:
    """Raise unless all runs name the same options."""
    for number, run in enumerate(runs):
        if run.options.keys() != runs[0].options.keys():
            raise ConfigError(
                f"sweep: run {number} has the options {sorted(run.options)}, run 0 has "
                f"{sorted(runs[0].options)}; they must be the same"
            )


def transformation(
    make: Make, numbers: Mapping[str, jax.Array], adapters: Any, dtype: Any
) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer of one slot, for its adapters; it trains B as fast as the rest."""
    # As Python numbers would be, they are of the dtype of what they are multiplied with.
    given = {name: x.astype(dtype) for name, x in numbers.items()}
    clip, _, rate = (given.pop(name) for name in ("clip", "b_ratio", "learning_rate"))
    knows_pairs = "params" in inspect.signature(make).parameters
    try:
        made = make(rate, adapters, **given) if knows_pairs else make(rate, **given)
    except jax.errors.ConcretizationTypeError as error:
        raise ConfigError(
            "sweep: the optimizer looks at the value of a number, which is an array here, another "
            f"one in each slot: {str(error).splitlines()[0]}"
        ) from error
    if knows_pairs:  # it freezes what does not train, and looks at scales too
        return optax.chain(freeze(_clipping(clip), adapters), made)
    return freeze(optax.chain(_clipping(clip), made), adapters)


def _clipping(norm: jax.Array) -> optax.GradientTransformation:
    """Return `optax.clip_by_global_norm`, which a norm of 0 disables."""
    clip = optax.clip_by_global_norm(norm)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        clipped, state = clip.update(updates, state, params)
        return jax.tree.map(lambda c, u: jnp.where(norm > 0, c, u), clipped, updates), state

    return optax.GradientTransformation(clip.init, update)


def faster_b(updates: Any, ratio: jax.Array) -> Any:
    """Return the updates with those of B times the ratio: LoRA+."""

    def one(path: str, node: Adapted) -> Adapted:
        if not isinstance(node, LoraWeight):
            return node
        return dataclasses.replace(node, b=node.b * ratio.astype(node.b.dtype))

    return map_adapted(one, updates)
