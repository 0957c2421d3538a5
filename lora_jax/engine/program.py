"""`Program`: a function traced once, to be evaluated on other leaves."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from lora_jax.engine import jaxprs
from lora_jax.engine.context import Context
from lora_jax.engine.interpreter import interpret
from lora_jax.engine.lazy_weight import is_lazy


class Program:
    """A function traced on some leaves: arrays and lazy weights are inputs, the rest is fixed."""

    def __init__(self, fn: Callable, treedef: Any, leaves: Sequence[Any]):
        self._dynamic = [i for i, leaf in enumerate(leaves) if is_dynamic(leaf)]
        self._static_out: list[Any] = []

        def flat(*arrays: Any) -> list[Any]:
            values = list(leaves)
            for i, array in zip(self._dynamic, arrays, strict=True):
                values[i] = array
            args, kwargs = jax.tree_util.tree_unflatten(treedef, values)
            outs, self._out_treedef = jax.tree_util.tree_flatten(fn(*args, **kwargs))
            self._static_out = [None if isinstance(x, jax.Array) else x for x in outs]
            self._is_array = [isinstance(x, jax.Array) for x in outs]
            return [x for x in outs if isinstance(x, jax.Array)]

        self.jaxpr, self.consts = jaxprs.trace(flat, *(abstract(leaves[i]) for i in self._dynamic))

    def evaluate(self, ctx: Context, leaves: Sequence[Any]) -> Any:
        """What the function returns on leaves like those it was traced on."""
        outs = interpret(ctx, self.jaxpr, self.consts, [leaves[i] for i in self._dynamic])
        arrays = iter(ctx.densify_output(x) if is_lazy(x) else x for x in outs)
        merged = [
            next(arrays) if is_array else static
            for is_array, static in zip(self._is_array, self._static_out, strict=True)
        ]
        return jax.tree_util.tree_unflatten(self._out_treedef, merged)


def is_dynamic(leaf: Any) -> bool:
    """Whether an argument's leaf is traced; numpy arrays and Python scalars stay what they are."""
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or is_lazy(leaf)


def abstract(leaf: Any) -> Any:
    """What to trace a leaf as: a weight as its base, of whatever kind of array it is."""
    if not is_lazy(leaf):
        return leaf
    # A jax.Array says more than shape and dtype: its sharding, where that is part of its type.
    return leaf.w if isinstance(leaf.w, jax.Array) else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
