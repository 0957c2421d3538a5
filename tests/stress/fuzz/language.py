"""The language of the random programs: frozen descriptions, and what each operation computes.

A description's `repr` is Python that makes it again. A block is straight-line code: its values are
the captured ones (by their index in the block around it), the operands that its container hands in
(a scan's carry and slices), and the results of its operations, numbered in that order.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation: its name, the values that it reads, static parameters, programs inside."""

    name: str
    args: tuple[int, ...]
    params: tuple = ()
    blocks: tuple["Block", ...] = ()


@dataclasses.dataclass(frozen=True)
class Block:
    """Operations on `captures` (indices in the block around it) and operands; `outs` come out."""

    captures: tuple[int, ...]
    ops: tuple[Op, ...]
    outs: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter. `layout` is named to `init`; `fallback` only where inference declines.

    `quantized` is a kind and the axis of its blocks; what the weight stands for is then its values.
    """

    shape: tuple[int, ...]
    dtype: str = "float64"
    adapted: bool = True
    layout: str | None = None
    fallback: str = ""
    quantized: tuple[str, int] | None = None


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of weights, floating inputs and four integers; `block` captures them in order.

    `reverse` says whether gradients or (where there is a `while`) tangents are compared; in
    "bfloat16" every weight and input is cast before anything else is done.
    """

    weights: tuple[Weight, ...]
    inputs: tuple[tuple[int, ...], ...]
    block: Block
    rank: int = 1
    reverse: bool = True
    compute: str = "float64"
    seed: int = 0


def function(program: Program) -> Callable[..., list[jax.Array]]:
    """`fn(params, inputs, numbers)`: the program as a JAX function; params are w0, w1, ..."""

    def fn(params: dict[str, Any], inputs: Sequence[Any], numbers: Any) -> list[jax.Array]:
        leaves = [params[f"w{i}"] for i in range(len(program.weights))]
        values = [lax.convert_element_type(x, program.compute) for x in (*leaves, *inputs)]
        return evaluate(program.block, [*values, numbers])

    return fn


def evaluate(block: Block, values: Sequence[Any]) -> list[Any]:
    """The outputs of a block on its captured values and operands."""
    env = list(values)
    for op in block.ops:
        if op.name in CONTAINERS:
            env.extend(CONTAINERS[op.name](env, op))
        else:
            out = OPERATIONS[op.name](*(env[i] for i in op.args), *op.params)
            env.extend(out if isinstance(out, list | tuple) else [out])
    return [env[i] for i in block.outs]


def operations(block: Block) -> list[str]:
    """The names of a block's operations, those of inner blocks too."""
    inner = [name for op in block.ops for b in op.blocks for name in operations(b)]
    return [op.name for op in block.ops] + inner


# --- operations -----------------------------------------------------------------------------------


def fit(x: Any, shape: tuple[int, ...]) -> Any:
    """A bounded array of any shape, in which every entry of `x` takes part in every entry."""
    size = int(np.prod(shape))
    table = np.cos(1.7 * np.outer(np.arange(1, x.size + 1), np.arange(1, size + 1)) ** 0.5)
    table = jnp.asarray(table / np.sqrt(x.size), x.dtype)
    return lax.sin(lax.reshape(lax.dot(lax.reshape(x, (x.size,)), table), shape))


def fold(x: Any, y: Any) -> Any:
    """`y` mixed into `x`: the end of a loop's body."""
    return lax.tanh(lax.mul(x, jnp.asarray(0.5, x.dtype)) + fit(y, x.shape).astype(x.dtype))


def same(x: Any, kind: str) -> Any:
    """`x` as it is, through an operation that moves nothing."""
    if kind == "copy":
        return jnp.array(x, copy=True)
    if kind == "stop_gradient":
        return lax.stop_gradient(x)
    return lax.optimization_barrier(x) if kind == "barrier" else checkpoint_name(x, "kept")


def take(x: Any, ids: Any, axis: int, mode: str, negative: bool) -> Any:
    """Entries of one axis by numbers; out of bounds only where the mode keeps them apart."""
    ids = jnp.asarray(ids) if mode == "clip" else jnp.asarray(ids) % x.shape[axis]
    return jnp.take(x, ids - x.shape[axis] if negative else ids, axis, mode=mode)


def index(x: Any, number: Any, axis: int, negative: bool) -> Any:
    """`x[:, i]` with a number that is known at run time."""
    number = number % x.shape[axis] - (x.shape[axis] if negative else 0)
    return x[(slice(None),) * axis + (number,)]


def dynamic_slice(x: Any, number: Any, axes: tuple[int, ...], sizes: tuple[int, ...]) -> Any:
    """A window that starts at `number` (clamped) along some axes and at 0 along the others."""
    starts = [number if i in axes else jnp.zeros_like(number) for i in range(x.ndim)]
    return lax.dynamic_slice(x, starts, sizes)


def convolution(x: Any, w: Any, specs: tuple[str, str, str], options: tuple) -> Any:
    padding, strides, lhs_dilation, rhs_dilation, groups = options
    return lax.conv_general_dilated(
        x,
        w,
        strides,
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=specs,
        feature_group_count=groups,
    )


OPERATIONS: dict[str, Callable[..., Any]] = {
    "fit": fit,
    "fold": fold,
    "same": same,
    "take": take,  # (x, numbers); `take_constant` has them among its parameters
    "take_constant": lambda x, ids, *rest: take(x, np.array(ids), *rest),
    "take_along_axis": lambda x, ids, axis: jnp.take_along_axis(x, np.array(ids), axis),
    "index": index,
    "dynamic_slice": dynamic_slice,
    "convolution": convolution,
    "pick": lambda numbers, k: numbers[k],
    "tanh": lax.tanh,
    "sin": lax.sin,
    "square": lambda x: x * x,
    "transpose": lax.transpose,
    "reshape": lambda x, shape, order: jnp.reshape(x, shape, order=order),
    "slice": lax.slice,
    "split": lambda x, sizes, axis: lax.split(x, sizes, axis),
    "unstack": lambda x, axis: jnp.unstack(x, axis=axis),
    "rev": lax.rev,
    "squeeze": lax.squeeze,
    "expand_dims": lax.expand_dims,
    "multiple": lambda x, c: x * c,
    "quotient": lambda x, c: x / c,
    "negative": lambda x: -x,
    "broadcast_in_dim": lax.broadcast_in_dim,
    "repeat": lambda x, n, axis: jnp.repeat(x, n, axis),
    "tile": jnp.tile,
    "roll": lambda x, n, axis: jnp.roll(x, n, axis),
    "pad": lambda x, widths: jnp.pad(x, widths),
    "tril": lambda x: jnp.tril(x),
    "cumsum": lambda x, axis: lax.cumsum(x, axis),
    "sum": lambda x, axes: x.sum(axes),
    "concatenate": lambda *xs: lax.concatenate(xs[:-1], xs[-1]),
    "stack": lambda *xs: jnp.stack(xs[:-1], xs[-1]),
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "select": lambda number, x, y: jnp.where(number > 1, x, y),
    "update_slice": lambda x, y, number: lax.dynamic_update_slice(
        x, y, [number] + [jnp.zeros_like(number)] * (x.ndim - 1)
    ),
    "einsum": lambda x, y, subscripts: jnp.einsum(subscripts, x, y),
    "dot_general": lambda x, y, numbers: lax.dot_general(x, y, numbers),
    "ragged_dot": lambda x, w, sizes: lax.ragged_dot(x, w, np.array(sizes, np.int32)),
}


# --- containers -----------------------------------------------------------------------------------

Env = list[Any]
Container = Callable[[Env, Op], Sequence[Any]]
CONTAINERS: dict[str, Container] = {}


def container(fn: Container) -> Container:
    CONTAINERS[fn.__name__.rstrip("_")] = fn
    return fn


def captured(env: Env, block: Block) -> Env:
    return [env[i] for i in block.captures]


@container
def jit(env: Env, op: Op) -> Sequence[Any]:
    """Params: whether values are closed over; indices for a second call of the same function."""
    (block,), (closed, again) = op.blocks, op.params
    values = captured(env, block)
    if closed:
        return jax.jit(lambda: evaluate(block, values))()
    call = jax.jit(lambda *values: evaluate(block, values))
    second = call(*(env[i] for i in again)) if again else []
    return [*call(*values), *second]


@container
def remat(env: Env, op: Op) -> Sequence[Any]:
    (block,), (closed, policy, prevent_cse) = op.blocks, op.params
    values = captured(env, block)
    policy = policy and getattr(jax.checkpoint_policies, policy)
    call = lambda *args: evaluate(block, args or values)
    wrapped = jax.checkpoint(call, policy=policy, prevent_cse=prevent_cse)
    return wrapped() if closed else wrapped(*values)


@container
def vmap(env: Env, op: Op) -> Sequence[Any]:
    """Params: the mapped axis (or None) of each captured value; that of each output."""
    (block,), (in_axes, out_axes) = op.blocks, op.params
    call = jax.vmap(lambda *values: evaluate(block, values), in_axes, list(out_axes))
    return call(*captured(env, block))


@container
def scan(env: Env, op: Op) -> Sequence[Any]:
    """Args: carry, then xs. Params: how many are carry; length; reverse; unroll."""
    (block,), (n_carry, length, reverse, unroll) = op.blocks, op.params
    values, operands = captured(env, block), [env[i] for i in op.args]

    def body(carry: Any, xs: Any) -> Any:
        outs = evaluate(block, [*values, *carry, *xs])
        return outs[:n_carry], outs[n_carry:]

    carry, ys = lax.scan(
        body, operands[:n_carry], operands[n_carry:], length, reverse=reverse, unroll=unroll
    )
    return [*carry, *ys]


@container
def while_loop(env: Env, op: Op) -> Sequence[Any]:
    """Args: how often (a number), then the carry. The second block makes a bounded test value."""
    body, test = op.blocks
    number, *carry = (env[i] for i in op.args)

    def keep_going(state: Any) -> Any:
        (value,) = evaluate(test, [*captured(env, test), *state[1]])
        return (state[0] < 1 + number % 3) & (value.sum() < 100)

    def step(state: Any) -> Any:
        return state[0] + 1, evaluate(body, [*captured(env, body), *state[1]])

    return lax.while_loop(keep_going, step, (jnp.zeros_like(number), carry))[1]


@container
def switch(env: Env, op: Op) -> Sequence[Any]:
    """Args: the number. Params: whether the branches close over their values."""
    (number,), (closed,) = (env[i] for i in op.args), op.params
    branches = op.blocks
    index = number % len(branches)
    if closed:
        return lax.switch(index, [lambda b=b: evaluate(b, captured(env, b)) for b in branches])
    calls = [lambda env, b=b: evaluate(b, captured(env, b)) for b in branches]
    return lax.switch(index, calls, env)


@container
def grad(env: Env, op: Op) -> Sequence[Any]:
    """Params: the positions among the captured values that are differentiated."""
    (block,), (positions,) = op.blocks, op.params

    def loss(*values: Any) -> Any:
        return sum(fit(y, ()) for y in evaluate(block, values))

    return jax.grad(loss, positions)(*captured(env, block))


@container
def jvp(env: Env, op: Op) -> Sequence[Any]:
    """Params: the position among the captured values that is moved, along its own sine."""
    (block,), (position,) = op.blocks, op.params
    values = captured(env, block)

    def moved(value: Any) -> list[Any]:
        return evaluate(block, [*values[:position], value, *values[position + 1 :]])

    outs, dots = jax.jvp(moved, [values[position]], [lax.sin(values[position])])
    return [*outs, *dots]


@container
def custom_jvp(env: Env, op: Op) -> Sequence[Any]:
    """An author's rule that is three times the true derivative, so that the two are told apart."""
    (block,) = op.blocks
    plain = lambda *values: evaluate(block, values)
    call = jax.custom_jvp(plain)

    @call.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        outs, dots = jax.jvp(plain, primals, tangents)
        return outs, [3 * dot for dot in dots]

    return call(*captured(env, block))


@container
def custom_vjp(env: Env, op: Op) -> Sequence[Any]:
    """An author's rule that is five times the true derivative."""
    (block,) = op.blocks
    plain = lambda *values: evaluate(block, values)
    call = jax.custom_vjp(plain)

    def backward(values: Any, cotangents: Any) -> Any:
        _, transposed = jax.vjp(plain, *values)
        return tuple(5 * x for x in transposed(cotangents))

    call.defvjp(lambda *values: (plain(*values), values), backward)
    return call(*captured(env, block))


@container
def shard_map(env: Env, op: Op) -> Sequence[Any]:
    """Params: for each captured value the axis that two devices share, or None."""
    (block,), (in_axes,) = op.blocks, op.params
    spec = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = tuple(spec() if at is None else spec(*[None] * at, "d") for at in in_axes)
    call = jax.shard_map(
        lambda *values: evaluate(block, values), mesh=mesh, in_specs=specs, out_specs=spec("d")
    )
    return call(*captured(env, block))
