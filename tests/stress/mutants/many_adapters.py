"""Mutants of stacks, mixed batches, sweeps, the algebra and the optimizers that know A from B."""

from tests.stress.mutants.mutant import Mutant

ROWS = ["tests/engine/rows"]
STACKS = ["tests/adapters/stacks"]
SWEEPS = ["tests/adapters/sweeps"]
ALGEBRA = ["tests/adapters/algebra", "tests/parity/peft/test_combined.py"]
PAIRS = [
    *("tests/adapters/optimizers", "tests/parity/lora_rite"),
    "tests/parity/peft/test_riemannian.py",
]

MUTANTS = [
    Mutant(
        "give every row the first slot",
        "engine/rows/slots.py",
        "ids = jnp.maximum(slot, 0)",
        "ids = jnp.zeros_like(slot)",
        (ROWS,),
    ),
    Mutant(
        "let the first slot into rows of the plain base",
        "engine/rows/slots.py",
        "b = jnp.where(along_rows(slot >= 0, picked.b_axes), b, jnp.zeros_like(b))",
        "pass",
        (ROWS,),
    ),
    Mutant(
        "drop the same inputs in every row",
        "engine/rows/slots.py",
        "    return jax.vmap(jax.random.fold_in)(keys.reshape(-1), numbers).reshape(keys.shape)",
        "    return keys",
        (ROWS,),
    ),
    Mutant(
        "let rows be indexed by any numbers",
        "engine/rows/equations.py",
        "if i not in columns or not ids.has_number(list(columns).index(i)):",
        "if i not in columns:",
        (ROWS,),
    ),
    Mutant(
        "multiply the scale into the B of every row",
        "engine/rows/slots.py",
        "picked = picked if slot.ndim else with_scale_in_b(picked)",
        "picked = with_scale_in_b(picked)",
        (ROWS,),
    ),
    Mutant(
        "let a loop go on until all rows are done",
        "engine/rows/mixing.py",
        "self.waits |= self.outputs(cond, asked)[0].mixed is not None",
        "self.outputs(cond, asked)",
        (ROWS,),
    ),
    Mutant(
        "sum over the rows unnoticed",
        "engine/rows/equations.py",
        "return MIX if any(i in wide.axes(v) for v, dims in pairs for i in dims) else None",
        "return None",
        (ROWS,),
    ),
    Mutant(
        "take the rows of a merged axis to be its inner part",
        "engine/rules/rows_apart.py",
        "sizes = (outer, rows, inner)",
        "sizes = (outer, inner, rows)",
        (ROWS,),
    ),
    Mutant(
        "pad adapters of a stack with ones",
        "adapters/stacks/frame.py",
        "return jnp.pad(x.astype(like.dtype), widths)",
        "return jnp.pad(x.astype(like.dtype), widths, constant_values=1)",
        (STACKS,),
    ),
    Mutant(
        "give a magnitude to each slot of a stack",
        "core/dora.py",
        "on &= slot_has_magnitude(node.slot)",
        "on &= node.slot[..., 2] >= 0",
        (STACKS,),
    ),
    Mutant(
        "take the slot 0 of a stack for the base",
        "core/slots.py",
        "jnp.expand_dims(ids >= 0,",
        "jnp.expand_dims(ids >= -1,",
        (STACKS,),
    ),
    Mutant(
        "let a scale switch on what a slot of a stack does not adapt",
        "adapters/switches.py",
        "return jnp.where(on, scale, jnp.zeros_like(scale))",
        "return scale",
        (STACKS,),
    ),
    Mutant(
        "dequantize the base once for each slot of a sweep",
        "engine/quantized/view.py",
        "return _zero_from(x), False",
        "return jax.vmap(zero.fun)(x), True",
        (SWEEPS,),
    ),
    Mutant(
        "clip all runs of a sweep alike, where none asks for it too",
        "adapters/sweeps/optimizer.py",
        "jnp.where(norm > 0, c, u)",
        "c",
        (SWEEPS,),
    ),
    Mutant(
        "start a run that takes a slot at the step of the last one",
        "adapters/sweeps/sweep.py",
        "jnp.int32(run.seed), jnp.int32(0)",
        "jnp.int32(run.seed), jnp.int32(1)",
        (SWEEPS,),
    ),
    Mutant(
        "let a run that pauses start again",
        "adapters/sweeps/halving.py",
        "sweep.start(trial.run) if trial.paused is None else trial.paused",
        "sweep.start(trial.run)",
        (SWEEPS,),
    ),
    Mutant(
        "subtract adapters on both factors, which adds them",
        "adapters/algebra/combined_factors.py",
        "roots = jnp.where(weights < 0, -root, root), root",
        "roots = (jnp.where(weights < 0, -root, root),) * 2",
        (ALGEBRA,),
    ),
    Mutant(
        "let the weights vote in TIES",
        "adapters/algebra/methods.py",
        'tally = (values if recipe.majority_sign == "total" else signs).sum(0)',
        'tally = (weighted if recipe.majority_sign == "total" else signs).sum(0)',
        (ALGEBRA,),
    ),
    Mutant(
        "average the elected values over all adapters",
        "adapters/algebra/methods.py",
        "jnp.maximum(agree.sum(0), 1)",
        "jnp.full_like(agree.sum(0), len(agree))",
        (ALGEBRA,),
    ),
    Mutant(
        "round the density's count",
        "adapters/algebra/methods.py",
        "count = int(density * m * n)",
        "count = round(density * m * n)",
        (ALGEBRA,),
    ),
    Mutant(
        "look for intruders among the inputs",
        "adapters/algebra/intruders.py",
        "similarity = jnp.abs(matmul(vt, known.T)).max(-1)",
        "similarity = jnp.abs(matmul(u.T, truncated_svd(before, min(before.shape))[0])).max(-1)",
        (ALGEBRA,),
    ),
    Mutant(
        "precondition a factor with itself",
        "adapters/optimizers/riemannian.py",
        "return gradients.map(one, factors.swapped), {}",
        "return gradients.map(one, factors), {}",
        (PAIRS,),
    ),
    Mutant(
        "carry no first moment to the basis of this step",
        "adapters/optimizers/rite.py",
        "mu = b1 * matmul(before.mu, transposed(carry))",
        "mu = b1 * before.mu",
        (PAIRS,),
    ),
    Mutant(
        "move a weight by the learning rate times its scale",
        "adapters/optimizers/muon.py",
        "half = _inverse(scale.astype(factors.a.dtype)) * rate",
        "half = jnp.sign(scale.astype(factors.a.dtype)) * rate",
        (PAIRS,),
    ),
    Mutant(
        "let the padding of a rank move",
        "adapters/optimizers/pairs.py",
        "group.unstack(_without_padding(moves, factors), gradients)",
        "group.unstack(moves, gradients)",
        (PAIRS,),
    ),
]
