"""The layers of a model, one after the other, or stacked and in a scan."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn


def scanned(target: Any, count: int, shared: int, each: int = 0, more: Sequence[str] = ()) -> Any:
    """Return `nn.scan` of a layer whose parameters are stacked along a first axis.

    Args:
      target: a class of modules, or a function of a module and of what the module takes. It returns
        a pair, of which the first is passed on to the next layer and the second is stacked.
      count: number of layers.
      shared: how many arguments after the first are the same for all layers.
      each: how many arguments after those have an axis of layers in front.
      more: collections beside the parameters that layers leave, if a call asks for them.
    """
    return nn.scan(
        target,
        variable_axes={"params": 0, **dict.fromkeys(more, 0)},
        split_rngs={"params": True},
        in_axes=(*[nn.broadcast] * shared, *[0] * each),
        length=count,
    )


def run(
    layers: nn.Module | Sequence[nn.Module],
    count: int,
    x: jax.Array,
    *shared: Any,
    each: Sequence[Any] = (),
) -> jax.Array:
    """Apply layers that return what the next one takes.

    Args:
      layers: a list, or one module, whose parameters are then stacked.
      count: number of layers.
      x: of the first layer.
      *shared: further arguments of all layers.
      each: arguments behind those of stacked layers, with an axis of layers in front.
    """
    if not isinstance(layers, nn.Module):
        for layer in layers:
            x = layer(x, *shared)
        return x
    return scanned(_with_nothing, count, len(shared), len(each))(layers, x, *shared, *each)[0]


def _with_nothing(layer: Callable[..., Any], *args: Any) -> tuple[Any, None]:
    return layer(*args), None
