"""Break the engine on purpose, one way at a time, and check that the tests notice.

    python -m tests.stress.engine_mutants            every mutant, about a minute each
    python -m tests.stress.engine_mutants scale cast those whose name contains one of the words

Print how many tests fail on each, and which. Exit with 1 if a mutant survives.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", "-n", "auto"]
TESTS = [
    *("tests/engine/test_transform.py", "tests/engine/test_products.py"),
    *("tests/adapters/test_optim.py", "tests/adapters/test_merge.py", "tests/engine/test_dora.py"),
]
PROGRAMS = ["tests/engine/test_programs.py", "-k", "merged_model and float64 or sized"]
QUANTIZED = [
    *("tests/engine/quantized", "tests/core/quantized", "tests/adapters/quantized"),
    "tests/adapters/test_merge_quantized.py",
]
ROWS = ["tests/engine/rows"]
ALGEBRA = ["tests/adapters/algebra", "tests/parity/peft/test_combined.py"]
PAIRS = [
    *("tests/adapters/optimizers", "tests/parity/lora_rite"),
    "tests/parity/peft/test_riemannian.py",
]
STACKS = ["tests/adapters/stacks"]
SWEEPS = ["tests/adapters/sweeps"]


class Mutant(NamedTuple):
    """A change to one file of the package."""

    name: str
    file: str
    old: str
    new: str
    selections: tuple[list[str], ...] = (TESTS, PROGRAMS)


MUTANTS = [
    Mutant(
        "drop the scale",
        "engine/lazy_weight.py",
        "return a, lax.mul(b.astype(dtype), scale)",
        "return a, b.astype(dtype)",
    ),
    Mutant(
        "swap A and B's contraction",
        "engine/products.py",
        "min((pair, pair[::-1]), key=operations)",
        "max((pair, pair[::-1]), key=operations)",
    ),
    Mutant(
        "contract with A twice, never with B",
        "engine/products.py",
        "pair = (lazy.a, lazy.a_axes), (lazy.b, lazy.b_axes)",
        "pair = (lazy.a, lazy.a_axes), (lazy.a, lazy.a_axes)",
    ),
    Mutant(
        "skip the cast of the factors",
        "engine/arithmetic.py",
        "return x.astype(compute), factor.astype(compute), result",
        "return x.astype(factor.dtype), factor, result",
    ),
    Mutant(
        "skip the cast of the sum",
        "engine/arithmetic.py",
        "return lax.add(y.astype(wide), update.astype(wide)).astype(dtype)",
        "return lax.add(y.astype(wide), update.astype(wide))",
    ),
    Mutant(
        "give each weight of a group the first one's x·A",
        "engine/products.py",
        "return lax.split(h, [part.shape[len(rows)] for part in parts], axis=h.ndim - 1)",
        "return [h[..., : part.shape[len(rows)]] for part in parts]",
    ),
    Mutant(
        "narrow an update whose result is in float32",
        "engine/products.py",
        "narrow=forms.narrow and jnp.dtype(dtype).itemsize <= 2",
        "narrow=forms.narrow",
    ),
    Mutant(
        "leave out the barriers that keep the branch apart",
        "engine/products.py",
        "return lax.optimization_barrier(x) if forms.apart else x",
        "return x",
    ),
    Mutant(
        "let XLA fold the transpose of A",
        "engine/lazy_weight.py",
        "a = lax.optimization_barrier(a.reshape(-1)).reshape(a.shape)",
        "pass",
    ),
    Mutant(
        "let gradients into the base",
        "engine/lazy_weight.py",
        "return QuantizedView.of(w) if is_quantized(w) else frozen(w)",
        "return QuantizedView.of(w) if is_quantized(w) else w",
    ),
    Mutant(
        "let gradients into the scale",
        "engine/lazy_weight.py",
        "scale = lax.stop_gradient(scale)",
        "scale = scale",
    ),
    Mutant(
        "let gradients into the other leaves",
        "engine/transform.py",
        "return frozen(leaf) if isinstance(leaf, jax.Array) else leaf",
        "return leaf",
    ),
    Mutant(
        "form W + A·B in place of the branch",
        "engine/interpreter.py",
        "    if not any(map(is_lazy, values)):\n",
        "    from lora_jax.engine.arithmetic import to_dense\n"
        "    values = [to_dense(v) if is_lazy(v) else v for v in values]\n"
        "    if not any(map(is_lazy, values)):\n",
    ),
    Mutant(
        "scan the weights' first axis without the factors",
        "engine/rules/scan_while.py",
        "if lead in getattr(lazy, axes):",
        'if lead in getattr(lazy, axes) and name != "b":',
    ),
    Mutant(
        "train the scale",
        "adapters/kept_shardings.py",
        '("a", "b", "magnitude", "value")',
        '("a", "b", "magnitude", "value", "scale")',
    ),
    Mutant(
        "merge without the scale",
        "core/weights.py",
        "a, b, scale = (x.astype(dtype) for x in (weight.a, weight.b, weight.scale))",
        "a, b = (x.astype(dtype) for x in (weight.a, weight.b))\n"
        "    scale = jnp.ones_like(weight.scale, dtype)",
    ),
    Mutant(
        "let gradients into DoRA's norms",
        "core/dora.py",
        "scale, norms = jax.lax.stop_gradient((node.scale, norms))",
        "scale = jax.lax.stop_gradient(node.scale)",
    ),
    Mutant(
        "leave out the norm's cross term",
        "core/dora.py",
        "own + 2 * crossed + squared",
        "own + squared",
    ),
    Mutant(
        "forget the gain where the outputs are contracted",
        "engine/contraction.py",
        "x = apply_gain(x, branch.x_axes, lazy)",
        "pass",
    ),
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
        "let gradients into a quantized base",
        "engine/quantized/view.py",
        "return cls(jax.tree.map(frozen, weight))",
        "return cls(weight)",
        (QUANTIZED,),
    ),
    Mutant(
        "dequantize every layer at once",
        "engine/quantized/view.py",
        "    if tie is None or not after.size or misfit:",
        "    if True:",
        (QUANTIZED,),
    ),
    Mutant(
        "make values wait for what varies over a mesh",
        "engine/quantized/view.py",
        "if tie is None or not after.size or misfit:",
        "if tie is None or not after.size:",
        (QUANTIZED,),
    ),
    Mutant(
        "keep the values for the backward pass",
        "engine/quantized/view.py",
        "    return again(view, x)",
        "    return again.__wrapped__(view, x)",
        (QUANTIZED,),
    ),
    Mutant(
        "lose the inputs that scale a quantized weight",
        "engine/quantized/view.py",
        "    if view.may_have_gradient:",
        "    if False:",
        (QUANTIZED,),
    ),
    Mutant(
        "transpose codes and not the axis of their blocks",
        "engine/quantized/moves.py",
        "lambda x: lax.transpose(x, order), list(order).index(blocked_axis(w)))",
        "lambda x: lax.transpose(x, order), blocked_axis(w))",
        (QUANTIZED,),
    ),
    Mutant(
        "slice across blocks",
        "core/quantized/parts.py",
        "if stride != 1 or start % block or limit % block:",
        "if stride != 1:",
        (QUANTIZED,),
    ),
    Mutant(
        "differentiate a merge-aware branch by its activation too",
        "engine/contraction.py",
        "lazy, still, tie = branch.lazy, lax.stop_gradient(x), ctx.forms.tie",
        "lazy, still, tie = branch.lazy, x, ctx.forms.tie",
        (QUANTIZED,),
    ),
    Mutant(
        "swap the halves of packed codes",
        "core/quantized/bits.py",
        "return jnp.concatenate([fn(codes & jnp.uint8(15)), fn(codes >> jnp.uint8(4))], axis)",
        "return jnp.concatenate([fn(codes >> jnp.uint8(4)), fn(codes & jnp.uint8(15))], axis)",
        (QUANTIZED,),
    ),
    Mutant(
        "requantize what no factor changes",
        "engine/quantized/merge_aware.py",
        "return jnp.where(off, w.astype(self.dtype), values) if own else values",
        "return values",
        (QUANTIZED,),
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
]


def run(mutant: Mutant) -> list[str]:
    """Return the ids of the tests that fail on the mutant."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("lora_jax", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        path = copy / "lora_jax" / mutant.file
        source = path.read_text(encoding="utf-8")
        if source.count(mutant.old) != 1:
            raise SystemExit(
                f"{mutant.name}: its text is not in {mutant.file} exactly once; update the mutant"
            )
        path.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
        failed = []
        for selection in mutant.selections:
            out = subprocess.run(
                [*PYTEST, *selection],
                cwd=copy,
                env={**os.environ, "PYTHONPATH": str(copy)},
                capture_output=True,
                text=True,
                check=False,
            ).stdout
            failed += re.findall(r"^(?:FAILED|ERROR) tests/(\S+)", out, re.MULTILINE)
        return failed


def main(words: list[str]) -> int:
    """Run the mutants whose name contains one of the words; without words, all."""
    survivors = 0
    for mutant in MUTANTS:
        if words and not any(word in mutant.name for word in words):
            continue
        failed = run(mutant)
        survivors += not failed
        print(f"{mutant.name} ({mutant.file}): {len(failed) or 'NO'} tests failed")
        for name in failed:
            print(f"    {name}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
