"""The same programs as batches: every row with its own adapter equals the row alone, merged."""

import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from tests.programs import merged
from tests.stress.fuzz import numpy_eval
from tests.stress.fuzz.check import (
    Outcome,
    adapted_weights,
    difference,
    quantized_weights,
    values,
    with_gradients,
    with_tangents,
)
from tests.stress.fuzz.language import Program, function, operations

IDS = (1, -1, 0)
#: What JAX does not map, or not per row: it is refused, with its name.
REFUSED = ("ragged_dot vmap", "divides the rows among devices", "shard_map")


def check_rows(program: Program) -> Outcome:
    """Compare outputs and gradients (tangents, where there is a `while`) of a batch, row by row."""
    outcome = Outcome()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            got, want = _run(program, outcome)
        except Exception as error:
            known = [words for words in REFUSED if words in str(error)]
            if known:
                outcome.skipped = known[0]
            else:
                outcome.problem = f"crash: {type(error).__name__}: {str(error)[:300]}"
            return outcome
    outcome.problem = difference(got, want, want, coarse=False)
    return outcome


def _run(program: Program, outcome: Outcome) -> tuple[Any, Any]:
    """(ours, the oracle's)."""
    program = dataclasses.replace(program, compute="float64")
    params, inputs, numbers = values(program)
    nodes = adapted_weights(program, params, inputs, numbers, outcome)
    base = params | quantized_weights(program, params)
    rng = np.random.default_rng(program.seed + 2)
    other = jax.tree.map(lambda x: rng.normal(size=x.shape), nodes)
    inputs = [np.stack([x, x + 1, x * 2]) for x in inputs]
    fn = function(program)

    def batch(params: Any, inputs: Any, numbers: Any) -> Any:
        if program.seed % 2:
            return jax.lax.map(lambda row: fn(params, row, numbers), inputs)
        return jax.vmap(lambda row: fn(params, row, numbers))(inputs)

    derive = with_gradients if program.reverse else with_tangents

    def both(point: Any, base: Any) -> Any:
        def joined(overlay: Any) -> Any:
            weights = {p: dataclasses.replace(node, w=base[p]) for p, node in overlay.items()}
            return base | weights

        def ours(trained: Any, inputs: Any) -> Any:
            stack = lora_jax.stack([dict.fromkeys(base) | overlay for overlay in trained])
            run = lora_jax.lora(batch, adapters_of=np.array(IDS), row_axes={1: 0, 2: None})
            return run(lora_jax.join(base, stack), inputs, numbers)

        def alone(trained: Any, inputs: Any) -> Any:
            plain = {p: w.dequantize() if hasattr(w, "dequantize") else w for p, w in base.items()}
            wide = jax.tree.map(lambda x: jnp.asarray(x, "float64"), plain)

            def frozen(path: str, node: Any) -> Any:
                scale = jax.lax.stop_gradient(node.scale)
                return dataclasses.replace(node, w=wide[path], scale=scale)

            rows = []
            for n, i in enumerate(IDS):
                params = wide
                if i >= 0:
                    frozen = {
                        p: dataclasses.replace(
                            node, w=wide[p], scale=jax.lax.stop_gradient(node.scale)
                        )
                        for p, node in trained[i].items()
                    }
                    params = merged(wide | frozen)
                rows.append(fn(params, [x[n] for x in inputs], numbers))
            return [jnp.stack(xs) for xs in zip(*rows, strict=True)]

        return derive(ours, *point), derive(alone, *point)

    compiled = "shard_map" in operations(program.block)  # NumPy has one device
    run = jax.jit(both) if compiled else functools.partial(numpy_eval.run, both)
    return run(((nodes, other), inputs), base)
