"""One call of an NNX model as a pure function of its parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from lora_jax.core.errors import ConfigError
from lora_jax.frameworks.nnx.variables import is_same_array


@dataclasses.dataclass(frozen=True)
class _Array:
    """The place of an array among the arguments."""

    number: int


@dataclasses.dataclass(frozen=True)
class Call:
    """A function of a model and its arguments, split into structure and arrays.

    Objects of NNX among the arguments, such as `nnx.Rngs`, are split together with the model, so
    that what they share with it stays shared.
    """

    fn: Callable[..., Any]
    graphdef: Any
    params: nnx.State  # the parameters of the model
    variables: nnx.State  # all other variables, of the model and of the arguments
    arrays: list[Any]  # the arguments that are arrays, or shapes of them

    @classmethod
    def of(cls, fn: Callable[..., Any], model: nnx.Module, args: Any, kwargs: Any) -> "Call":
        """Split a model and its arguments; nothing is copied."""
        leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=_is_nnx)
        arrays = [x for x in leaves if _is_array(x)]
        numbers = iter(range(len(arrays)))
        places = [_Array(next(numbers)) if _is_array(x) else x for x in leaves]
        whole = model, *jax.tree.unflatten(treedef, places)
        graphdef, (params, variables) = _split(whole)
        if 0 not in params:
            raise ConfigError(f"{type(model).__name__} has no nnx.Param, so nothing to adapt")
        return cls(fn, graphdef, params[0], variables, arrays)

    def pure(self, params: Any, variables: Any, arrays: Any) -> tuple[Any, Any]:
        """Return what the function returns, and all variables after it."""
        whole = nnx.merge(self.graphdef, nnx.State({0: params}), variables)
        is_place = lambda x: isinstance(x, _Array) or _is_nnx(x)
        fill = lambda x: arrays[x.number] if isinstance(x, _Array) else x
        args, kwargs = jax.tree.map(fill, whole[1:], is_leaf=is_place)
        out = self.fn(whole[0], *args, **kwargs)
        _, (_, after) = _split(whole)
        return out, after

    def put(self, after: Any, whole: Any) -> None:
        """Write the variables that a call changed or made into the model and the arguments."""
        before = dict(nnx.to_flat_state(self.variables))
        here = {path: x for path, x in nnx.iter_graph(whole) if isinstance(x, nnx.Variable)}
        made = {}
        for path, new in nnx.to_flat_state(after):
            if path in before and is_same_array(_value(new), _value(before[path])):
                continue
            if path in here:
                here[path].set_raw_value(_value(new))  # an error where this trace may not
            else:
                made[path] = new
        if made:
            nnx.update(whole, nnx.from_flat_state(made))


def _split(whole: Any) -> tuple[Any, Any]:
    """Return the structure of `(model, args, kwargs)`, and (the model's parameters, all else)."""
    graphdef, *states = nnx.split(whole, _is_parameter, ...)
    return graphdef, states


def _is_parameter(path: tuple[Any, ...], x: Any) -> bool:
    """Return whether a variable of `(model, args, kwargs)` is a parameter of the model."""
    return path[0] == 0 and isinstance(x, nnx.Param)


def _is_nnx(x: Any) -> bool:
    return isinstance(x, nnx.Pytree | nnx.Variable)


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype") and not _is_nnx(x)


def _value(x: Any) -> Any:
    return x.get_raw_value() if isinstance(x, nnx.Variable) else x
