"""The comparison: a program on adapted weights against the same program on merged ones."""

import dataclasses
import functools
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from lora_jax.core.quantized.weight import quantize_array
from tests.programs import merged
from tests.programs.forms import FORMS
from tests.stress.fuzz import numpy_eval
from tests.stress.fuzz.language import Program, Weight, function, operations

TOLERANCE = 1e-9  # of max(1, the largest entry), in float64
ROUNDINGS = 12  # a bfloat16 outcome may be off by so many times what the merged model is off by


@dataclasses.dataclass
class Outcome:
    """What became of one program; `problem` is None where adapted equals merged."""

    problem: str | None = None
    declined: Counter = dataclasses.field(default_factory=Counter)  # by `init`, and why
    dense: Counter = dataclasses.field(default_factory=Counter)  # primitives that needed the whole
    skipped: str | None = None  # JAX itself does not run the plain program, and why


def check(
    program: Program, oracle: Callable[[Any], Any] = merged, compiled: bool = False
) -> Outcome:
    """Outputs and gradients (tangents, where there is a `while`) of adapted against `oracle`.

    By NumPy, or `compiled` by XLA, which takes some five times as long.
    """
    outcome = Outcome()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            got = _run(program, outcome, oracle, compiled)
        except Exception as error:
            reason = plain_failure(program)
            if reason is None:
                outcome.problem = f"crash: {type(error).__name__}: {error}"
            outcome.skipped = reason
            return outcome
    messages = {str(w.message) for w in caught if w.category is lora_jax.DenseWarning}
    outcome.dense.update(re.findall(r": `(\w+)` at", "\n".join(messages)))
    outcome.problem = difference(*got, coarse=program.compute != "float64")
    return outcome


def _run(
    program: Program, outcome: Outcome, oracle: Callable, compiled: bool
) -> tuple[Any, Any, Any]:
    """(ours, the oracle's, what each leaf may be off by)."""
    params, inputs, numbers = values(program)
    nodes = adapted_weights(program, params, inputs, numbers, outcome)
    codes = quantized_weights(program, params)
    params = {path: w for path, w in params.items() if path not in codes}
    factors = {path: (node.a, node.b, node.magnitude) for path, node in nodes.items()}
    scales = {path: node.scale for path, node in nodes.items()}

    def joined(factors: Any, params: Any, scales: Any, others: Any) -> Any:
        params = params | others
        return params | {
            path: dataclasses.replace(
                nodes[path], w=params[path], a=a, b=b, magnitude=m, scale=scales[path]
            )
            for path, (a, b, m) in factors.items()
        }

    exact = dataclasses.replace(program, compute="float64")
    forms = FORMS[zlib.crc32(repr(program).encode()) % len(FORMS)]
    adapted = lora_jax.lora(function(program), forms=forms)

    def all_at_once(trained: Any, frozen: Any, numbers: Any, codes: Any) -> Any:
        def ours(trained: Any, frozen: Any) -> Any:
            return adapted(joined(trained[0], *frozen, codes), trained[1], numbers)

        def plain(program: Program) -> Callable:
            def fn(trained: Any, frozen: Any) -> Any:
                params, scales = jax.lax.stop_gradient(frozen)
                values = {path: w.dequantize() for path, w in codes.items()}
                wide = jax.tree.map(lambda x: x.astype("float64"), params | values)
                merged = oracle(joined(trained[0], wide, scales, {}))
                return function(program)(merged, trained[1], numbers)

            return fn

        derive = with_gradients if program.reverse else with_tangents
        want = derive(plain(exact), trained, frozen)
        rounded = want if program.compute == "float64" else derive(plain(program), trained, frozen)
        return derive(ours, trained, frozen), want, rounded

    compiled = compiled or "shard_map" in operations(program.block)  # NumPy has one device
    run = jax.jit(all_at_once) if compiled else functools.partial(numpy_eval.run, all_at_once)
    return run((factors, inputs), (params, scales), numbers, codes)


def values(program: Program) -> tuple[dict[str, Any], list[Any], Any]:
    """The parameters, the inputs and the four numbers."""
    rng = np.random.default_rng(program.seed)
    params = {
        f"w{i}": rng.normal(size=w.shape).astype(w.dtype) for i, w in enumerate(program.weights)
    }
    inputs = [rng.normal(size=shape) for shape in program.inputs]
    return params, inputs, rng.permutation(4).astype("int32")


def quantized_weights(program: Program, params: Any) -> dict[str, Any]:
    """The quantized parameters."""
    kinds = {f"w{i}": w.quantized for i, w in enumerate(program.weights) if w.quantized}
    return {
        path: numpy_eval.run(lambda w, kind=kind: quantize_array(w, *kind), params[path])
        for path, kind in kinds.items()
    }


def adapted_weights(
    program: Program, params: Any, inputs: Any, numbers: Any, outcome: Outcome
) -> Any:
    """The adapted weights, with random factors; where `init` declines one its layout is named.

    In every third program they have magnitudes (DoRA) too.
    """
    weights = {f"w{i}": w for i, w in enumerate(program.weights) if w.adapted}
    overrides = {path: {"layout": w.layout} for path, w in weights.items() if w.layout}
    while True:
        config = lora_jax.LoraConfig(
            rank=program.rank,
            alpha=1.5,
            targets=list(weights),
            overrides=overrides,
            dtype="float64",
            dora=program.seed % 3 == 0,
        )
        try:
            tree = _on_shapes(config, function(program), params, inputs, numbers)
            break
        except (lora_jax.TargetError, lora_jax.LayoutError) as error:
            overrides = _named(overrides, weights, str(error), outcome)
    rng = np.random.default_rng(program.seed + 1)

    def one(node: Any) -> Any:
        leaves, treedef = jax.tree.flatten(dataclasses.replace(node, w=None))
        return jax.tree.unflatten(treedef, [rng.normal(size=x.shape) for x in leaves])

    return {path: one(tree[path]) for path in weights}


def _on_shapes(config: Any, fn: Callable, *args: Any) -> Any:
    """What `init` makes of shapes: layouts, and no values."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    params, *rest = shapes
    return jax.eval_shape(lambda: lora_jax.init(jax.random.key(0), params, config, fn, *rest))


def _named(
    overrides: dict[str, Any], weights: dict[str, Weight], message: str, outcome: Outcome
) -> dict[str, Any]:
    """The overrides that a refusal asks for: a layout, or a rank of one."""
    named = dict(overrides)
    for path in weights:
        for why, change in (
            ("never contracted", {"layout": weights[path].fallback}),
            ("does not say which axes", {"layout": weights[path].fallback}),
            ("is above what the weight", {"rank": 1}),
        ):
            if re.search(rf"^{path}: .*{why}", message, re.MULTILINE):
                outcome.declined[why] += 1
                named[path] = {**named.get(path, {}), **change}
    if named == overrides:
        raise AssertionError(f"init declines for a reason of its own: {message}")
    return named


def _weighted_sum(outs: list[Any]) -> Any:
    weigh = lambda x: np.cos(1 + np.arange(x.size)).reshape(x.shape)
    return sum((x.astype("float64") * weigh(x)).sum() for x in outs)


def with_gradients(fn: Callable, *point: Any) -> Any:
    """The outputs, and the gradients of a sum of them: zero for what is frozen."""

    def loss(*point: Any) -> Any:
        outs = fn(*point)
        return _weighted_sum(outs), outs

    grads, outs = jax.grad(loss, (0, 1), has_aux=True)(*point)
    return {"outputs": outs, "gradients": grads}


def with_tangents(fn: Callable, *point: Any) -> Any:
    """The outputs, and their tangents where everything moves, the frozen too."""
    outs, dots = jax.jvp(fn, point, jax.tree.map(jnp.sin, point))
    return {"outputs": outs, "tangents": dots}


def difference(got: Any, want: Any, rounded: Any, coarse: bool) -> str | None:
    """The first leaf that is off, and by how much."""
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(got)]
    leaves = zip(paths, *map(jax.tree.leaves, (got, want, rounded)), strict=True)
    for path, *arrays in leaves:
        types = [(x.shape, jnp.dtype(x.dtype).name) for x in arrays]
        if types[0] != types[2]:
            return f"{path}: {types[0]}, the oracle {types[2]}"
        ours, exact, merged16 = (np.asarray(x).astype("float64") for x in arrays)
        scale = max(1.0, float(np.abs(exact).max(initial=0)))
        allowed = TOLERANCE * scale
        if coarse:
            allowed = 0.1 * scale + ROUNDINGS * float(np.abs(merged16 - exact).max(initial=0))
        error = float(np.abs(ours - exact).max(initial=0))
        if not error <= allowed:
            return f"{path}: off by {error:.3g} where {allowed:.3g} is allowed"
    return None


def plain_failure(program: Program) -> str | None:
    """Why JAX does not run the plain program on plain weights; None where it does."""
    params, inputs, numbers = values(program)
    fn = lambda params, x: function(program)(params, x, numbers)
    derive = with_gradients if program.reverse else with_tangents
    try:
        jax.block_until_ready(jax.jit(lambda *point: derive(fn, *point))(params, inputs))
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return None
