"""Mutants of the engine, and of what merges and trains one adapter."""

from tests.stress.mutants.mutant import Mutant

SELECTIONS = (
    [
        *("tests/engine/test_transform.py", "tests/engine/test_products.py"),
        *("tests/adapters/test_optim.py", "tests/adapters/test_merge.py"),
        "tests/engine/test_dora.py",
    ],
    ["tests/engine/test_programs.py", "-k", "merged_model and float64 or sized"],
)

MUTANTS = [
    Mutant(
        "drop the scale",
        "engine/lazy_weight.py",
        "return a, lax.mul(b.astype(dtype), scale)",
        "return a, b.astype(dtype)",
        SELECTIONS,
    ),
    Mutant(
        "swap A and B's contraction",
        "engine/products.py",
        "min((pair, pair[::-1]), key=operations)",
        "max((pair, pair[::-1]), key=operations)",
        SELECTIONS,
    ),
    Mutant(
        "contract with A twice, never with B",
        "engine/products.py",
        "pair = (lazy.a, lazy.a_axes), (lazy.b, lazy.b_axes)",
        "pair = (lazy.a, lazy.a_axes), (lazy.a, lazy.a_axes)",
        SELECTIONS,
    ),
    Mutant(
        "skip the cast of the factors",
        "engine/arithmetic.py",
        "return x.astype(compute), factor.astype(compute), result",
        "return x.astype(factor.dtype), factor, result",
        SELECTIONS,
    ),
    Mutant(
        "skip the cast of the sum",
        "engine/arithmetic.py",
        "return lax.add(y.astype(wide), update.astype(wide)).astype(dtype)",
        "return lax.add(y.astype(wide), update.astype(wide))",
        SELECTIONS,
    ),
    Mutant(
        "give each weight of a group the first one's x·A",
        "engine/products.py",
        "return lax.split(h, [part.shape[len(rows)] for part in parts], axis=h.ndim - 1)",
        "return [h[..., : part.shape[len(rows)]] for part in parts]",
        SELECTIONS,
    ),
    Mutant(
        "narrow an update whose result is in float32",
        "engine/products.py",
        "narrow=forms.narrow and jnp.dtype(dtype).itemsize <= 2",
        "narrow=forms.narrow",
        SELECTIONS,
    ),
    Mutant(
        "leave out the barriers that keep the branch apart",
        "engine/products.py",
        "return lax.optimization_barrier(x) if forms.apart else x",
        "return x",
        SELECTIONS,
    ),
    Mutant(
        "let XLA fold the transpose of A",
        "engine/lazy_weight.py",
        "a = lax.optimization_barrier(a.reshape(-1)).reshape(a.shape)",
        "pass",
        SELECTIONS,
    ),
    Mutant(
        "let gradients into the base",
        "engine/lazy_weight.py",
        "return QuantizedView.of(w) if is_quantized(w) else frozen(w)",
        "return QuantizedView.of(w) if is_quantized(w) else w",
        SELECTIONS,
    ),
    Mutant(
        "let gradients into the scale",
        "engine/lazy_weight.py",
        "scale = lax.stop_gradient(scale)",
        "scale = scale",
        SELECTIONS,
    ),
    Mutant(
        "let gradients into the other leaves",
        "engine/transform.py",
        "return frozen(leaf) if isinstance(leaf, jax.Array) else leaf",
        "return leaf",
        SELECTIONS,
    ),
    Mutant(
        "form W + A·B in place of the branch",
        "engine/interpreter.py",
        "    if not any(map(is_lazy, values)):\n",
        "    from lora_jax.engine.arithmetic import to_dense\n"
        "    values = [to_dense(v) if is_lazy(v) else v for v in values]\n"
        "    if not any(map(is_lazy, values)):\n",
        SELECTIONS,
    ),
    Mutant(
        "scan the weights' first axis without the factors",
        "engine/rules/scan_while.py",
        "if lead in getattr(lazy, axes):",
        'if lead in getattr(lazy, axes) and name != "b":',
        SELECTIONS,
    ),
    Mutant(
        "train the scale",
        "adapters/kept_shardings.py",
        '("a", "b", "magnitude", "value")',
        '("a", "b", "magnitude", "value", "scale")',
        SELECTIONS,
    ),
    Mutant(
        "merge without the scale",
        "core/weights.py",
        "a, b, scale = (x.astype(dtype) for x in (weight.a, weight.b, weight.scale))",
        "a, b = (x.astype(dtype) for x in (weight.a, weight.b))\n"
        "    scale = jnp.ones_like(weight.scale, dtype)",
        SELECTIONS,
    ),
    Mutant(
        "let gradients into DoRA's norms",
        "core/dora.py",
        "scale, norms = jax.lax.stop_gradient((node.scale, norms))",
        "scale = jax.lax.stop_gradient(node.scale)",
        SELECTIONS,
    ),
    Mutant(
        "leave out the norm's cross term",
        "core/dora.py",
        "own + 2 * crossed + squared",
        "own + squared",
        SELECTIONS,
    ),
    Mutant(
        "forget the gain where the outputs are contracted",
        "engine/contraction.py",
        "x = apply_gain(x, branch.x_axes, lazy)",
        "pass",
        SELECTIONS,
    ),
]
