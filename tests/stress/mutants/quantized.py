"""Mutants of the quantized base."""

from tests.stress.mutants.mutant import Mutant

QUANTIZED = [
    *("tests/engine/quantized", "tests/core/quantized", "tests/adapters/quantized"),
    "tests/adapters/test_merge_quantized.py",
]

MUTANTS = [
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
]
