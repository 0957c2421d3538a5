"""`memory_report`: the memory of a training step before it runs, and of full fine-tuning."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.adapters.optim import labels
from lora_jax.adapters.partition import TRAIN
from lora_jax.adapters.quantize import dequantize
from lora_jax.adapters.split import join, split
from lora_jax.adapters.stacks.stack import slots_of
from lora_jax.core.errors import ConfigError
from lora_jax.core.params_argument import params_first
from lora_jax.core.quantized.weight import is_quantized
from lora_jax.core.sharding.data_axes import named_sharding
from lora_jax.core.tree import require_adapted
from lora_jax.core.weights import require_base
from lora_jax.initializers.example_batches import separate


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """The bytes that one training step needs at the same time."""

    base: int  # the parameters without adapters
    adapters: int  # A, B, scales, and trained values of leaves and rows
    optimizer: int  # the optimizer's state
    arguments: int  # the batch, and all else that the loss takes
    temporaries: int  # activations and gradients, as the compiler lays them out

    @property
    def total(self) -> int:
        """The sum of all fields."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """The memory of a step that trains adapters, and of a step that trains the whole base.

    `print` shows it as a table, in MiB.
    """

    adapted: StepMemory
    full: StepMemory

    def __str__(self) -> str:
        rows = [("MiB", "adapted", "full")]
        for name in [field.name for field in dataclasses.fields(StepMemory)] + ["total"]:
            rows.append((name, _mib(getattr(self.adapted, name)), _mib(getattr(self.full, name))))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            f"{name:{widths[0]}}  {adapted:>{widths[1]}}  {full:>{widths[2]}}"
            for name, adapted, full in rows
        )


def memory_report(
    fn: Callable,
    params: Any,
    *args: Any,
    tx: optax.GradientTransformation | None = None,
    argnum: int = 0,
    argname: str | None = None,
    slot_axes: Sequence[int | None] | None = None,
) -> MemoryReport:
    """Report the memory of one training step, and of the same step of full fine-tuning.

    Both steps are compiled for the default device, and neither runs: the gradient of the loss, the
    optimizer, and the new parameters and state, which take the memory of the old ones. Temporaries
    are what the compiler reports (`memory_analysis` of the compiled step). The bytes of a quantized
    base are those of its codes and scales; full fine-tuning is that of its floating values.

    Args:
      fn: a scalar loss of `(params, *args)` for adapted parameters, such as one that calls a
        function made by `lora`. It must accept the base without adapters too, dequantized.
      params: a joined tree of arrays, or of `ShapeDtypeStruct`s if nothing should be allocated.
      *args: the other arguments of `fn`; arrays or `ShapeDtypeStruct`s. What is neither, here or in
        `params` (a flag, the activation function of an Equinox model), is a constant of the step.
      tx: the optimizer of what trains, without `freeze`: of A, B and fully trained leaves in one
        step, of every floating leaf of the base in the other. None for Adam.
      argnum: the position of the parameters among the arguments of `fn`, as for `init`.
      argname: their name, as for `init`.
      slot_axes: for a stack of adapters whose `fn` is the loss of one: which axis of each of `args`
        belongs to the slots, None for one that all share, as `in_axes` of `jax.vmap`. The step then
        trains all adapters, each on its own; full fine-tuning has the arguments of one.

    Returns:
      A `MemoryReport`, whose fields are bytes; `print` shows it as a table.

    Raises:
      StructureError: `params` contains no adapters, or adapters without their base.
      ConfigError: `slot_axes` does not fit `args`, or the adapters are not a stack.
      NotImplementedError: the default backend's compiler reports no memory sizes.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    >>> params = lora_jax.init(jax.random.key(0), params, lora_jax.LoraConfig(rank=8))
    >>> apply = lora_jax.lora(lambda params, x: x @ params["kernel"])
    >>> x = jax.ShapeDtypeStruct((64, 1024), jnp.float32)
    >>> report = memory_report(lambda params, x: (apply(params, x) ** 2).mean(), params, x)
    >>> report.adapted.base, report.adapted.optimizer, report.full.optimizer
    (4194304, 131076, 8388612)
    """
    fn = params_first("memory_report", fn, argnum, argname)
    nodes = require_adapted("memory_report", params)
    for path, node in nodes.items():
        require_base(path, node)
    tx = optax.adam(1e-3) if tx is None else tx
    base, adapters = split(params)
    is_trained = [label == TRAIN for label in jax.tree.leaves(labels(params))]
    dense = dequantize(_abstract(base))
    is_floating = [
        _is_array(x) and jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(dense)
    ]
    of_all, args_of_one = fn, args
    if slot_axes is not None:
        of_all, args_of_one = _over_slots(fn, adapters, args, slot_axes)
    return MemoryReport(
        adapted=StepMemory(
            _bytes(base), _bytes(adapters), *_step_memory(of_all, tx, params, is_trained, args)
        ),
        full=StepMemory(_bytes(dense), 0, *_step_memory(fn, tx, dense, is_floating, args_of_one)),
    )


def _over_slots(
    fn: Callable, adapters: Any, args: tuple, axes: Sequence[int | None]
) -> tuple[Callable, tuple]:
    """Return the loss of all adapters of a stack, from that of one, and the arguments of one."""
    count = slots_of("memory_report", adapters)
    if len(axes) != len(args):
        raise ConfigError(
            f"memory_report: slot_axes has {len(axes)} entries for {len(args)} arguments"
        )

    def of_all(params: Any, *args: Any) -> Any:
        base, adapters = split(params)
        one = lambda overlay, *args: fn(join(base, overlay), *args)
        return jax.vmap(one, (0, *axes))(adapters, *args).sum()

    def of_one(path: str, x: Any, axis: int) -> Any:
        if not _is_array(x) or not -len(x.shape) <= axis < len(x.shape) or x.shape[axis] != count:
            raise ConfigError(
                f"memory_report: argument {path} has no axis {axis} of {count} slots; see slot_axes"
            )
        shape = [n for i, n in enumerate(x.shape) if i != axis % len(x.shape)]
        return jax.ShapeDtypeStruct(tuple(shape), x.dtype)

    single = tuple(
        arg if axis is None else jax.tree.map(lambda x, a=axis, n=n: of_one(str(n), x, a), arg)
        for n, (arg, axis) in enumerate(zip(args, axes, strict=True))
    )
    return of_all, single


def _abstract(base: Any) -> Any:
    """Return a base with shapes in place of the arrays of quantized weights."""
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=named_sharding(x))
    one = lambda leaf: jax.tree.map(shape, leaf) if is_quantized(leaf) else leaf
    return jax.tree.map(one, base, is_leaf=is_quantized)


def _step_memory(
    fn: Callable,
    tx: optax.GradientTransformation,
    params: Any,
    trains: Sequence[bool],
    args: tuple,
) -> tuple[int, int, int]:
    """Return the bytes of the optimizer's state, of the arguments and of the temporaries."""
    leaves, treedef = jax.tree.flatten(params)
    trained = [leaf for leaf, train in zip(leaves, trains, strict=True) if train]
    frozen = [leaf for leaf, train in zip(leaves, trains, strict=True) if not train]
    state = jax.eval_shape(tx.init, trained)
    constants, arrays = separate((frozen, args))  # an activation function, a flag: fixed

    def step(trained: Any, state: Any, arrays: Any) -> Any:
        frozen, args = constants.with_arrays(arrays)

        def loss(trained: Any) -> Any:
            each = {True: iter(trained), False: iter(frozen)}
            return fn(jax.tree.unflatten(treedef, [next(each[train]) for train in trains]), *args)

        value, grads = jax.value_and_grad(loss)(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(trained, state, arrays).compile()
    found = compiled.memory_analysis()
    if found is None:
        raise NotImplementedError("memory_report: this backend's compiler reports no memory sizes")
    return _bytes(state), _bytes(args), found.temp_size_in_bytes


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _bytes(tree: Any) -> int:
    arrays = [x for x in jax.tree.leaves(tree) if _is_array(x)]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)


def _mib(n: int) -> str:
    return f"{n / 2**20:,.1f}"
