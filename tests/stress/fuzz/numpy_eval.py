"""Evaluating a traced program with NumPy: nothing is compiled, which is most of a program's time.

For tiny arrays only; what has no entry in the tables here is handed to JAX, one equation at a time.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from lora_jax.engine import jaxprs


def evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """The outputs of a jaxpr as NumPy arrays."""
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return np.asarray(env[atom] if jaxprs.is_var(atom) else atom.val)

    for eqn in jaxpr.eqns:
        name, values = eqn.primitive.name, [read(atom) for atom in eqn.invars]
        if name in ELEMENTWISE:
            outs = [ELEMENTWISE[name](*values)]
        elif name in ARRAYS:
            outs = [ARRAYS[name](eqn.params, *values)]
        elif name in PROGRAMS:
            outs = PROGRAMS[name](eqn, *values)
        else:
            outs = jaxprs.bind(eqn, values)
        for var, out in zip(eqn.outvars, outs, strict=True):
            env[var] = np.asarray(out, var.aval.dtype)
            assert env[var].shape == var.aval.shape, f"{name}: {env[var].shape}, not {var.aval}"
    return [read(atom) for atom in jaxpr.outvars]


def run(fn: Callable, *args: Any) -> Any:
    """`fn(*args)`, traced and evaluated."""
    traced = jax.make_jaxpr(fn, return_shape=True)(*args)
    jaxpr, consts = jaxprs.open_jaxpr(traced[0])
    outs = evaluate(jaxpr, consts, jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(traced[1]), outs)


def wide(x: np.ndarray) -> np.ndarray:
    """16-bit floats as 32-bit ones, to add in."""
    return x.astype("float32") if x.dtype.itemsize == 2 else x


ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "neg": np.negative,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "square": np.square,
    "abs": np.abs,
    "sign": np.sign,
    "not": np.logical_not,
    "add": np.add,
    "add_any": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "rem": np.fmod,
    "shift_right_logical": np.right_shift,  # of unsigned integers
    "div": lambda x, y: np.fix(x / y) if x.dtype.kind in "iu" else x / y,
    "clamp": lambda low, x, high: np.clip(x, low, high),
    "select_n": lambda which, *cases: np.choose(which.astype(int), cases),
    "shift_left": np.left_shift,
    "copy": np.asarray,
    "stop_gradient": np.asarray,
    "lora_jax.sum": np.asarray,
    "copy_p": np.asarray,
    "name": np.asarray,
    "pvary": np.asarray,
}


def _broadcast(p: Any, x: np.ndarray) -> np.ndarray:
    sizes = [1] * len(p["shape"])
    for i, d in enumerate(p["broadcast_dimensions"]):
        sizes[d] = x.shape[i]
    return np.broadcast_to(x.reshape(sizes), p["shape"])


def _pad(p: Any, x: np.ndarray, fill: np.ndarray) -> np.ndarray:
    """Interior, then edge padding; a negative edge crops."""
    for axis, (low, high, interior) in enumerate(p["padding_config"]):
        n = x.shape[axis]
        spread = np.full(
            [*x.shape[:axis], max(0, n + (n - 1) * interior), *x.shape[axis + 1 :]], fill
        )
        at = (slice(None),) * axis
        spread[(*at, slice(None, None, interior + 1))] = x
        widths = [(max(0, low), max(0, high)) if k == axis else (0, 0) for k in range(x.ndim)]
        x = np.pad(spread, widths, constant_values=fill)
        x = x[(*at, slice(max(0, -low), x.shape[axis] - max(0, -high)))]
    return x


def _window(x: np.ndarray, starts: Sequence[Any], sizes: Sequence[int]) -> tuple[slice, ...]:
    """The clamped window of `dynamic_slice`."""
    lows = [int(np.clip(s, 0, n - k)) for s, n, k in zip(starts, x.shape, sizes, strict=True)]
    return tuple(slice(low, low + k) for low, k in zip(lows, sizes, strict=True))


def _update(p: Any, x: np.ndarray, part: np.ndarray, *starts: np.ndarray) -> np.ndarray:
    out = x.copy()
    out[_window(x, starts, part.shape)] = part
    return out


def _dot_general(p: Any, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    (x_sum, y_sum), (x_batch, y_batch) = p["dimension_numbers"]
    letters = iter(range(50))
    x_names, y_names = ([next(letters) for _ in range(a.ndim)] for a in (x, y))
    for i, j in (*zip(x_sum, y_sum, strict=True), *zip(x_batch, y_batch, strict=True)):
        y_names[j] = x_names[i]
    rest = [n for i, n in enumerate(x_names) if i not in (*x_sum, *x_batch)]
    rest += [n for j, n in enumerate(y_names) if j not in (*y_sum, *y_batch)]
    out = [*(x_names[i] for i in x_batch), *rest]
    return np.einsum(wide(x), x_names, wide(y), y_names, out)


def _cumsum(p: Any, x: np.ndarray) -> np.ndarray:
    turn = lambda a: np.flip(a, p["axis"]) if p["reverse"] else a
    return turn(np.cumsum(turn(wide(x)), p["axis"]))


def _round(p: Any, x: np.ndarray) -> np.ndarray:
    assert p["rounding_method"] is lax.RoundingMethod.TO_NEAREST_EVEN
    return np.rint(x)


def _iota(p: Any) -> np.ndarray:
    return np.indices(p["shape"])[p["dimension"]] if p["shape"] else np.zeros(())


ARRAYS: dict[str, Callable[..., np.ndarray]] = {
    "bitcast_convert_type": lambda p, x: x.view(p["new_dtype"]),
    "convert_element_type": lambda p, x: x.astype(p["new_dtype"]),
    "integer_pow": lambda p, x: x ** p["y"],
    "broadcast_in_dim": _broadcast,
    "reshape": lambda p, x: x.transpose(p["dimensions"] or range(x.ndim)).reshape(p["new_sizes"]),
    "transpose": lambda p, x: x.transpose(p["permutation"]),
    "squeeze": lambda p, x: x.squeeze(tuple(p["dimensions"])),
    "expand_dims": lambda p, x: np.expand_dims(x, tuple(p["dimensions"])),
    "slice": lambda p, x: x[
        tuple(map(slice, p["start_indices"], p["limit_indices"], p["strides"] or (1,) * x.ndim))
    ],
    "rev": lambda p, x: np.flip(x, p["dimensions"]),
    "concatenate": lambda p, *xs: np.concatenate(xs, p["dimension"]),
    "pad": _pad,
    "iota": _iota,
    "reduce_sum": lambda p, x: wide(x).sum(tuple(p["axes"])),
    "reduce_max": lambda p, x: x.max(tuple(p["axes"])),
    "round": _round,
    "cumsum": _cumsum,
    "dynamic_slice": lambda p, x, *starts: x[_window(x, starts, p["slice_sizes"])],
    "dynamic_update_slice": _update,
    "dot_general": _dot_general,
}


# --- gather, scatter, convolution -----------------------------------------------------------------


def _windows(
    numbers: Any,
    prefix: str,
    indices: np.ndarray,
    shape: Sequence[int],
    sizes: Sequence[int],
    mode: Any,
) -> Any:
    """(batch position, window or None where out of bounds) for every index of a gather."""
    start_map, batching, index_batching = (
        (
            numbers.start_index_map,
            numbers.operand_batching_dims,
            numbers.start_indices_batching_dims,
        )
        if prefix == "gather"
        else (
            numbers.scatter_dims_to_operand_dims,
            numbers.operand_batching_dims,
            numbers.scatter_indices_batching_dims,
        )
    )
    for at in itertools.product(*map(range, indices.shape[:-1])):
        starts = [0] * len(shape)
        for k, d in enumerate(start_map):
            starts[d] = int(indices[(*at, k)])
        for d, i in zip(batching, index_batching, strict=True):
            starts[d] = at[i]
        ends = [n - k for n, k in zip(shape, sizes, strict=True)]
        inside = all(0 <= s <= e for s, e in zip(starts, ends, strict=True))
        if mode == lax.GatherScatterMode.CLIP:
            starts, inside = [min(max(s, 0), e) for s, e in zip(starts, ends, strict=True)], True
        yield (
            at,
            tuple(slice(s, s + k) for s, k in zip(starts, sizes, strict=True)) if inside else None,
        )


def _gather(p: Any, x: np.ndarray, indices: np.ndarray) -> np.ndarray:
    numbers, sizes, fill = p["dimension_numbers"], p["slice_sizes"], p["fill_value"]
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    inner = [n for d, n in enumerate(sizes) if d not in gone]
    fill = (np.nan if x.dtype.kind not in "iub" else 0) if fill is None else fill
    out = np.full([*indices.shape[:-1], *inner], fill, x.dtype)
    for at, window in _windows(numbers, "gather", indices, x.shape, sizes, p["mode"]):
        if window is not None:
            out[at] = x[window].squeeze(tuple(gone))
    batch_axes = iter(range(indices.ndim - 1))
    inner_axes = iter(range(indices.ndim - 1, out.ndim))
    return out.transpose(
        [next(inner_axes if d in numbers.offset_dims else batch_axes) for d in range(out.ndim)]
    )


def _scatter_add(p: Any, x: np.ndarray, indices: np.ndarray, updates: np.ndarray) -> np.ndarray:
    numbers = p["dimension_numbers"]
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    window_dims = numbers.update_window_dims
    batch_dims = [d for d in range(updates.ndim) if d not in window_dims]
    updates = updates.transpose([*batch_dims, *window_dims])
    inner = iter(updates.shape[len(batch_dims) :])
    sizes = [1 if d in gone else next(inner) for d in range(x.ndim)]
    out = wide(x).copy()
    for at, window in _windows(numbers, "scatter", indices, x.shape, sizes, p["mode"]):
        if window is not None:
            out[window] += updates[at].reshape(sizes)
    return out


def _convolution(p: Any, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    numbers = p["dimension_numbers"]
    x, w = x.transpose(numbers.lhs_spec), w.transpose(numbers.rhs_spec)  # N C space, O I space
    spread = lambda a, d, edges: _pad(
        {"padding_config": [(0, 0, 0)] * 2 + [(*e, k - 1) for e, k in zip(edges, d, strict=True)]},
        wide(a),
        np.zeros((), wide(a).dtype),
    )
    x = spread(x, p["lhs_dilation"], p["padding"])
    w = spread(w, p["rhs_dilation"], [(0, 0)] * (w.ndim - 2))
    n_batch, n_feature = p["batch_group_count"], p["feature_group_count"]
    groups = max(n_batch, n_feature)
    per_in, per_out = w.shape[1], w.shape[0] // groups
    space = [
        max(0, (a - b) // s + 1)  # a window that is wider than what it slides over fits nowhere
        for a, b, s in zip(x.shape[2:], w.shape[2:], p["window_strides"], strict=True)
    ]
    rows = x.shape[0] // n_batch
    out = np.zeros([rows, w.shape[0], *space], x.dtype)
    for g in range(groups):
        part = x[g * rows : (g + 1) * rows] if n_batch > 1 else x[:, g * per_in : (g + 1) * per_in]
        kernel = w[g * per_out : (g + 1) * per_out]
        for at in itertools.product(*map(range, space)):
            starts = [i * s for i, s in zip(at, p["window_strides"], strict=True)]
            window = tuple(slice(s, s + n) for s, n in zip(starts, w.shape[2:], strict=True))
            values = np.tensordot(part[(..., *window)], kernel, [range(1, x.ndim)] * 2)
            out[(slice(None), slice(g * per_out, (g + 1) * per_out), *at)] = values
    return out.transpose(np.argsort(numbers.out_spec))


ARRAYS |= {
    "gather": _gather,
    "scatter-add": _scatter_add,
    "scatter_add": _scatter_add,
    "conv_general_dilated": _convolution,
}


# --- programs inside ------------------------------------------------------------------------------


def _call(eqn: Any, *args: Any) -> list[Any]:
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return evaluate(*jaxprs.open_jaxpr(inner), args)


def _scan(eqn: Any, *args: Any) -> list[Any]:
    p = eqn.params
    jaxpr, jaxpr_consts = jaxprs.open_jaxpr(p["jaxpr"])
    n_consts, n_carry = jaxprs.scan_counts(eqn)
    consts, carry = args[:n_consts], list(args[n_consts : n_consts + n_carry])
    xs, length = args[n_consts + n_carry :], p["length"]
    steps = range(length)[::-1] if p["reverse"] else range(length)
    ys = [np.zeros(var.aval.shape, var.aval.dtype) for var in eqn.outvars[n_carry:]]
    for i in steps:
        outs = evaluate(jaxpr, jaxpr_consts, [*consts, *carry, *(x[i] for x in xs)])
        carry = outs[:n_carry]
        for y, value in zip(ys, outs[n_carry:], strict=True):
            y[i] = value
    return [*carry, *ys]


def _while(eqn: Any, *args: Any) -> list[Any]:
    p = eqn.params
    test, body = jaxprs.open_jaxpr(p["cond_jaxpr"]), jaxprs.open_jaxpr(p["body_jaxpr"])
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    for_test, for_body = args[:n_cond], args[n_cond : n_cond + n_body]
    carry = list(args[n_cond + n_body :])
    while (going := evaluate(*test, [*for_test, *carry])[0]).any():
        moved = evaluate(*body, [*for_body, *carry])
        # Under vmap each example has a condition of its own, on the leading axes.
        going_on = [going.reshape(going.shape + (1,) * (x.ndim - going.ndim)) for x in carry]
        carry = [np.where(go, new, x) for go, new, x in zip(going_on, moved, carry, strict=True)]
    return carry


def _cond(eqn: Any, index: Any, *args: Any) -> list[Any]:
    branches = eqn.params["branches"]
    branch = branches[int(np.clip(int(index), 0, len(branches) - 1))]
    return evaluate(*jaxprs.open_jaxpr(branch), args)


def _split(eqn: Any, x: np.ndarray) -> list[np.ndarray]:
    return np.split(x, np.cumsum(eqn.params["sizes"])[:-1], eqn.params["axis"])


def _unstack(eqn: Any, x: np.ndarray) -> list[np.ndarray]:
    return list(np.moveaxis(x, eqn.params["axis"], 0))


def _linear(eqn: Any, *args: Any) -> list[Any]:
    return evaluate(*jaxprs.trace(eqn.params["linear"], *args), args)


PROGRAMS: dict[str, Callable[..., Sequence[Any]]] = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call", "remat2", "remat"), _call),
    **dict.fromkeys(("checkpoint", "custom_jvp_call", "custom_vjp_call"), _call),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "split": _split,
    "unstack": _unstack,
    "dequantized_product": _linear,
    "optimization_barrier": lambda eqn, *args: args,
}
