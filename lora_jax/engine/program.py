"""`Program`: a function traced once, with lazy weights among its arguments."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.paths import flatten_with_key_paths, path_str
from lora_jax.core.weights import is_adapted, is_weight
from lora_jax.engine import jaxprs
from lora_jax.engine.context import Context
from lora_jax.engine.interpreter import interpret
from lora_jax.engine.lazy_weight import is_lazy
from lora_jax.engine.quantized.view import QuantizedView

#: Which argument a leaf of (args, kwargs) belongs to: the first two keys of its path.
Argument = tuple[Any, ...]

#: The first positional argument, the parameters by convention.
FIRST: Argument = (jax.tree_util.SequenceKey(0),) * 2

#: `enter(argument, path, leaf)`: what stands in the program for a leaf at a path of an argument.
Enter = Callable[[Argument, str, Any], Any]


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced function and its inputs: arrays and lazy weights; other leaves are fixed."""

    jaxpr: Any
    consts: Sequence[Any]
    inputs: Sequence[Any]
    rebuild: Callable[[Sequence[Any]], Any]  # what the function returns, from the jaxpr's outputs

    @classmethod
    def of(cls, fn: Callable, args: Any, kwargs: Mapping[str, Any], enter: Enter) -> "Program":
        """Trace `fn(*args, **kwargs)` with what `enter` returns in place of each leaf.

        A `LoraWeight` or another adapted node counts as one leaf.
        """
        flat = flatten_with_key_paths((args, kwargs), is_leaf=is_adapted)
        treedef = jax.tree.structure((args, kwargs), is_leaf=is_weight)
        leaves = [enter(path[:2], path_str(path[2:]), leaf) for path, leaf in flat]
        dynamic = [i for i, leaf in enumerate(leaves) if is_dynamic(leaf)]
        outs_of: list[Any] = []

        def traced(*arrays: Any) -> list[Any]:
            values = list(leaves)
            for i, array in zip(dynamic, arrays, strict=True):
                values[i] = array
            args, kwargs = jax.tree_util.tree_unflatten(treedef, values)
            outs, out_treedef = jax.tree_util.tree_flatten(fn(*args, **kwargs))
            is_array = [isinstance(x, jax.Array) for x in outs]
            fixed = [None if known else x for x, known in zip(outs, is_array, strict=True)]
            outs_of[:] = [out_treedef, is_array, fixed]
            return [x for x, known in zip(outs, is_array, strict=True) if known]

        jaxpr, consts = jaxprs.trace(traced, *(_abstract(leaves[i]) for i in dynamic))
        out_treedef, is_array, fixed = outs_of

        def rebuild(arrays: Sequence[Any]) -> Any:
            values = iter(arrays)
            outs = [next(values) if known else x for x, known in zip(fixed, is_array, strict=True)]
            return jax.tree_util.tree_unflatten(out_treedef, outs)

        return cls(jaxpr, consts, [leaves[i] for i in dynamic], rebuild)

    def evaluate(self, ctx: Context) -> Any:
        """Return what the function returns; a weight that it returns is materialized."""
        outs = interpret(ctx, self.jaxpr, self.consts, self.inputs)
        return self.rebuild([_array(ctx.densify_output(x) if is_lazy(x) else x) for x in outs])


def adapted_arguments(args: Any, kwargs: Mapping[str, Any]) -> set[Argument]:
    """Return the arguments that contain adapted or quantized weights."""
    flat, _ = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_weight)
    return {path[:2] for path, leaf in flat if is_weight(leaf)}


def is_dynamic(leaf: Any) -> bool:
    """Return whether a leaf is traced; numpy arrays and Python scalars stay what they are."""
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or is_lazy(leaf)


def _array(x: Any) -> Any:
    """Return an output as JAX returns it: a program has constants as scalars of Python or NumPy."""
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def _abstract(leaf: Any) -> Any:
    """Return what to trace a leaf as: a weight as its base, of whatever kind of array it is."""
    if not is_lazy(leaf):
        return leaf
    if isinstance(leaf.w, QuantizedView):
        return leaf.w.aval
    # A jax.Array says more than shape and dtype: its sharding, where that is part of its type.
    return leaf.w if isinstance(leaf.w, jax.Array) else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
