"""User-defined rules, for primitives that the library does not know: kernels, foreign calls."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.errors import ConfigError, LayoutError
from lora_jax.core.layout import Layout
from lora_jax.engine import jaxprs, named_axes
from lora_jax.engine.context import Context
from lora_jax.engine.contraction import DotBranch, add_branch
from lora_jax.engine.lazy_weight import RANK, Axis, LazyWeight, is_lazy
from lora_jax.engine.quantized.view import QuantizedView


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a custom primitive handles adapted weights: `lora(fn, rules={"name": Rule(...)})`.

    Without a rule such a primitive gets the dense weight. With one, `apply` gets an `Operand` for
    each adapted input at a position in `layouts`, and `init(..., rules=...)` knows from the letters
    which axes of the weight are in and out.

    Args:
      apply: `apply(call, *inputs)` returns the primitive's outputs (one array, or a list where the
        primitive has several results). `call(*arrays)` runs the primitive itself with the
        equation's parameters, which are in `call.params`. Adapted inputs are `Operand`s, others
        arrays. Return `NotImplemented` to have the weight materialized after all, for example for
        a `pallas_call` of another kernel.
      layouts: for each input that may be adapted, by position, one letter per axis: `i` for axes
        that the primitive sums over, `o` for those that are in its output, `b` for batch axes.

    Raises:
      LayoutError: the letters are not a layout.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> from jax.extend.core import Primitive
    >>> matmul = Primitive("my_matmul")  # a kernel, say
    >>> _ = matmul.def_impl(lambda x, w: x @ w)
    >>> shaped = lambda x, w: jax.core.ShapedArray((x.shape[0], w.shape[1]), x.dtype)
    >>> _ = matmul.def_abstract_eval(shaped)
    >>> def apply(call, x, w):
    ...     return call(x, w.w) + w.branch(x)
    >>> rules = {"my_matmul": lora_jax.Rule(apply, {1: "io"})}
    >>> def model(params, x):
    ...     return matmul.bind(x, params["w"])
    >>> x, params = jnp.ones((1, 2)), {"w": jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])}
    >>> config = lora_jax.LoraConfig(rank=1)
    >>> adapted = lora_jax.init(jax.random.key(0), params, config, model, x, rules=rules)
    >>> adapted["w"].layout.axes
    'io'
    >>> lora_jax.lora(model, on_dense="error", rules=rules)(adapted, x)
    Array([[5., 7., 9.]], dtype=float32)
    """

    apply: Callable
    layouts: Mapping[int, str]

    def __post_init__(self) -> None:
        for axes in self.layouts.values():
            Layout(axes)


@dataclasses.dataclass(frozen=True)
class Operand:
    """An adapted input of a primitive, `w + a·b`, as a user-defined rule sees it.

    Its axes are those of the input that the primitive gets, however the parameter is stored; the
    rule's letters say which are in and out.
    """

    w: jax.Array  # the base, shaped like the input
    a: jax.Array  # [*batch, *in, rank], in the dtype of w
    b: jax.Array  # [*batch, rank, *out], in the dtype of w, the scale included
    branch: Callable[[jax.Array], jax.Array]
    """`branch(x)` returns `(x·a)·b` `[*batch, ..., *out]` for an x `[*batch, ..., *in]`.

    The result has x's dtype and is accumulated in float32 at least. Dropout is applied where it is
    on.
    """


@dataclasses.dataclass(frozen=True)
class Call:
    """The primitive at one place in a program: `call(*arrays)` runs it."""

    _eqn: Any

    @property
    def params(self) -> Mapping[str, Any]:
        """The equation's parameters."""
        return self._eqn.params

    def __call__(self, *arrays: jax.Array) -> Any:
        """Run the primitive; return its output, a list if it has several."""
        outs = jaxprs.bind(self._eqn, arrays)
        return outs if self._eqn.primitive.multiple_results else outs[0]


def check_rules(rules: Mapping[str, Rule] | None) -> None:
    """Raise a ConfigError unless `rules` maps names of primitives to rules."""
    for name, rule in (rules or {}).items():
        if not isinstance(name, str) or not isinstance(rule, Rule):
            raise ConfigError(
                f"rules: must map names of primitives to Rules, got {name!r}: {rule!r}"
            )


def apply_rule(ctx: Context, rule: Rule, eqn: Any, args: Sequence[Any]) -> Any:
    """Return the outputs of `eqn` by a user-defined rule, or NotImplemented."""
    operands = []
    for position, x in enumerate(args):
        if not is_lazy(x):
            operands.append(x)
            continue
        letters = rule.layouts.get(position)
        grouped = None if letters is None else _group_axes(eqn, x, letters)
        if grouped is not None and ctx.infers:
            ctx.record(x, eqn, summed=grouped["i"], batch=grouped["b"])
            operands.append(x.w)
            continue
        if isinstance(x.w, QuantizedView):
            x = ctx.dequantize(x, eqn, " (its rule gets an array)")
        if x.a is None:
            operands.append(x.w)
            continue
        operand = None if grouped is None else _operand(ctx, x, grouped)
        operands.append(ctx.densify(x, eqn) if operand is None else operand)
    if ctx.infers:
        return jaxprs.bind(eqn, operands)
    if not any(isinstance(x, Operand) for x in operands):
        return jaxprs.bind(eqn, operands)
    outs = rule.apply(Call(eqn), *operands)
    if outs is NotImplemented or eqn.primitive.multiple_results:
        return outs
    return [outs]


def _group_axes(eqn: Any, lazy: LazyWeight, letters: str) -> dict[str, list[Axis]]:
    """Group the axes of the view by the rule's letters."""
    if len(letters) != len(lazy.axes):
        raise LayoutError(
            f"{lazy.origin}: the rule for {eqn.primitive.name!r} has the layout {letters!r}, but "
            f"the input has the shape {list(lazy.shape)}"
        )
    pairs = list(zip(lazy.axes, letters, strict=True))
    return {kind: [axis for axis, letter in pairs if letter == kind] for kind in "bio"}


def _operand(ctx: Context, lazy: LazyWeight, grouped: dict[str, list[Axis]]) -> Operand | None:
    """Return the weight as the rule sees it; None if its factors do not divide at in and out."""
    batch, ins, outs = grouped["b"], grouped["i"], grouped["o"]
    sides = [(lazy.a, lazy.a_axes), (lazy.b, lazy.b_axes)]
    if not set(lazy.a_axes) <= {RANK, *batch, *ins}:
        sides.reverse()  # the layout's in and out are the rule's out and in
    (first, first_axes), (second, second_axes) = sides
    fits = {*first_axes} <= {RANK, *batch, *ins} and {*second_axes} <= {RANK, *batch, *outs}
    if lazy.w is None or lazy.gain is not None or lazy.served is not None or not fits:
        return None
    a = named_axes.arrange(first, first_axes, [*batch, *ins, RANK], lazy.sizes)
    b = named_axes.arrange(second, second_axes, [*batch, RANK, *outs], lazy.sizes)

    def branch(x: jax.Array) -> jax.Array:
        n_free = x.ndim - len(batch) - len(ins)
        free = [Axis((), -2 - i) for i in range(n_free)]
        dot = DotBranch(lazy, (*batch, *free, *ins), (*batch, *free, *outs), x.dtype)
        if not lazy.probe:
            return add_branch(ctx, dot, None, x)
        sizes = dict(zip(dot.x_axes, x.shape, strict=True)) | lazy.sizes
        return add_branch(ctx, dot, jnp.zeros([sizes[axis] for axis in dot.out_axes], x.dtype), x)

    return Operand(lazy.w, a.astype(lazy.dtype), b.astype(lazy.dtype), branch)
