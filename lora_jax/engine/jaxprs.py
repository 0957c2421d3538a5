"""Reading and rebuilding jaxprs: everything that a new JAX release can break is here."""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core, source_info_util
from jax.interpreters import ad, batching, mlir, partial_eval

Literal = core.Literal

#: An open jaxpr, and the values of its constvars.
JaxprAndConsts = tuple[Any, Sequence[Any]]


def open_jaxpr(jaxpr: Any) -> JaxprAndConsts:
    """Return the (jaxpr, consts) of a jaxpr, in whatever form a release stores it in equations."""
    # 0.10 wraps a closed jaxpr around an open one; from 0.12 on a jaxpr carries its own consts.
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def trace(fn: Callable, *args: Any) -> JaxprAndConsts:
    """Trace `fn` on arrays or `ShapeDtypeStruct`s, one per argument."""
    return open_jaxpr(jax.make_jaxpr(fn)(*args))


def evaluate(jaxpr: Any, args: Sequence[Any]) -> list[Any]:
    """Run what `jax.make_jaxpr` returned on these inputs."""
    return core.jaxpr_as_fun(jaxpr)(*args)


@contextlib.contextmanager
def equation_context(eqn: Any) -> Iterator[None]:
    """Give what is traced inside the source line and the name scopes of `eqn`."""
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with (
        source_info_util.user_context(eqn.source_info.traceback, name_stack=stack),
        eqn.ctx.manager,
    ):
        yield


def line_context(eqn: Any) -> contextlib.AbstractContextManager[None]:
    """Give what is traced inside the source line of `eqn`, not its name scopes."""
    return source_info_util.user_context(eqn.source_info.traceback)


def are_transformed(values: Any) -> bool:
    """Return whether an array among these is being differentiated or mapped, not only recorded."""
    return any(
        isinstance(x, jax.core.Tracer) and not isinstance(x, partial_eval.DynamicJaxprTracer)
        for x in jax.tree.leaves(values)
    )


def bind(eqn: Any, values: Sequence[Any], **changes: Any) -> list[Any]:
    """Evaluate `eqn` on other inputs (and parameters), as JAX itself would."""
    params = eqn.primitive.get_bind_params(eqn.params | changes)
    out = eqn.primitive.bind(*values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def source_line(eqn: Any) -> str:
    """Return the user's line that made `eqn`, "file.py:12 (function)"."""
    return source_info_util.summarize(eqn.source_info)


def scan_counts(eqn: Any) -> tuple[int, int]:
    """Return how many of a scan's inputs are loop constants, and how many are carried."""
    params = eqn.params
    if "ft_in" in params:  # 0.12 describes the inputs by trees: (consts, carry, xs)
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def jvp_rule(
    eqn: Any, zero_tangents: Sequence[bool]
) -> tuple[Any, Sequence[Any], Sequence[Any], Sequence[bool]]:
    """Return the rule of a `custom_jvp_call`: (jaxpr, consts, first inputs, zero tangents out).

    The jaxpr takes those inputs, the primals, then the tangents that are not zero; it returns the
    primals out, then the tangents out that are not zero.
    """
    jaxpr, consts, zeros_out = eqn.params["jvp_jaxpr_fun"].call_wrapped(*zero_tangents)
    jaxpr = open_jaxpr(jaxpr)[0]
    # From 0.12 on the constants are the jaxpr's first inputs.
    consts, first = (consts, ()) if len(jaxpr.constvars) == len(consts) else ((), consts)
    return jaxpr, consts, first, zeros_out


def shardings(eqn: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return the input and output shardings of a `jit` equation; None where none is specified."""

    def given(items: Sequence[Any]) -> list[Any]:
        return [None if type(s).__name__ == "UnspecifiedValue" else s for s in items]

    if "in_shardings" not in eqn.params:
        return [None] * len(eqn.invars), [None] * len(eqn.outvars)
    return given(eqn.params["in_shardings"]), given(eqn.params["out_shardings"])


def called_program(eqn: Any) -> JaxprAndConsts | None:
    """Return the program that `eqn` calls on its own inputs, if it contains one."""
    avals = [(atom.aval.shape, atom.aval.dtype) for atom in eqn.invars]
    for value in eqn.params.values():
        jaxpr, consts = open_jaxpr(value)
        if hasattr(jaxpr, "eqns") and avals == [(v.aval.shape, v.aval.dtype) for v in jaxpr.invars]:
            return jaxpr, consts
    return None


def identity_primitive(name: str) -> core.Primitive:
    """Return a primitive that returns its input, for a policy of `jax.checkpoint` to find.

    It differs from `jax.ad_checkpoint.checkpoint_name`: JAX can transpose it.
    """
    primitive = core.Primitive(name)
    primitive.def_impl(lambda x: x)
    primitive.def_abstract_eval(lambda aval: aval)
    ad.primitive_jvps[primitive] = lambda xs, ts: (primitive.bind(*xs), *ts)
    ad.primitive_transposes[primitive] = lambda ct, _: [ct]
    batching.defvectorized(primitive)
    mlir.register_lowering(primitive, lambda _, x: [x])
    return primitive


def linear_primitive(name: str) -> core.Primitive:
    """Return a primitive that applies `linear`, a function of constants and, last, an array `x`.

    `linear(*constants, x)` must be linear in `x`. Its `flip()` is the transpose of it, and its
    `map(dims)` the function of many examples. Constants have no tangents and no cotangents. Those
    that are equal are traced once per type of their inputs, and lowered to calls of one function.
    """
    primitive = core.Primitive(name)

    def infer_type(*avals: Any, linear: Any) -> Any:
        return _type_of(linear, avals, jax.sharding.get_abstract_mesh())

    def push_forward(args: Sequence[Any], tangents: Sequence[Any], *, linear: Any) -> Any:
        y, dx = primitive.bind(*args, linear=linear), tangents[-1]
        if isinstance(dx, ad.Zero):
            return y, ad.Zero(jax.typeof(y).to_tangent_aval())
        return y, primitive.bind(*args[:-1], dx, linear=linear)

    def pull_back(ct: Any, *args: Any, linear: Any) -> Any:
        constants, x = args[:-1], args[-1]
        if isinstance(ct, ad.Zero):
            dx = ad.Zero(x.aval)
        else:
            dx = primitive.bind(*constants, ct, linear=linear.flip())
        return [*(None for _ in constants), dx]

    def map_examples(args: Sequence[Any], dims: Sequence[Any], *, linear: Any) -> Any:
        *constants, x = args
        if dims[-1] is None:
            size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
            x = jnp.broadcast_to(x, (size, *x.shape))
        else:
            x = jnp.moveaxis(x, dims[-1], 0)
        return primitive.bind(*constants, x, linear=linear.map(dims[:-1])), 0

    def lower(*args: Any, linear: Any) -> Any:
        return linear(*args)

    primitive.def_impl(jax.jit(lower, static_argnames="linear"))
    primitive.def_abstract_eval(infer_type)
    ad.primitive_jvps[primitive] = push_forward
    ad.primitive_transposes[primitive] = pull_back
    batching.primitive_batchers[primitive] = map_examples
    lowering = mlir.lower_fun(lower, multiple_results=False)
    mlir.register_lowering(primitive, lowering, inline=False)
    return primitive


@functools.lru_cache(maxsize=4096)
def _type_of(fn: Callable, avals: Sequence[Any], mesh: Any) -> Any:
    """Return the type of what `fn` returns for inputs of these types, in the context of a mesh."""
    return trace(fn, *avals)[0].outvars[0].aval


def is_var(atom: Any) -> bool:
    """Return whether an equation's input is a variable, not a literal."""
    return not isinstance(atom, Literal)


def shard_map_arguments(eqn: Any) -> dict[str, Any]:
    """Return the keyword arguments of `jax.shard_map` that made this equation."""
    params = eqn.params
    return {
        "mesh": params["mesh"],
        "in_specs": params["in_specs"],
        "out_specs": params["out_specs"],
        "axis_names": params["newly_manual_axes"],
        "check_vma": params["check_vma"],
    }


def varies_over(x: Any, mesh_axes: Collection[Any]) -> bool:
    """Return whether the type of `x` says that it varies over any of these mesh axes.

    Inside a `shard_map` with check_vma=False no array's type does.
    """
    return bool(jax.typeof(x).manual_axis_type.varying & set(mesh_axes))


def vary_alike(x: Any, y: Any) -> bool:
    """Return whether the types of two arrays say that they vary over the same mesh axes."""
    one, other = (jax.typeof(z).manual_axis_type.varying for z in (x, y))
    return set(one) == set(other)


def make_varying(x: jax.Array, mesh_axes: Collection[Any]) -> jax.Array:
    """Return `x`, with a type that says that it varies over these mesh axes too."""
    missing = [n for n in mesh_axes if n not in jax.typeof(x).manual_axis_type.varying]
    return lax.pcast(x, tuple(missing), to="varying")


def zeros(aval: Any) -> jax.Array:
    """Return zeros of a type, sharded and varying over the mesh as it says."""
    sharding = aval.sharding if any(aval.sharding.spec) else None
    zeros = jnp.zeros(aval.shape, aval.dtype, device=sharding)
    return make_varying(zeros, aval.manual_axis_type.varying)


def restrict_to(jaxpr: Any, consts: Sequence[Any], outvars: Sequence[Any]) -> JaxprAndConsts:
    """Return the part of a program that computes these variables."""
    needed, eqns = {v for v in outvars if is_var(v)}, []
    for eqn in reversed(jaxpr.eqns):
        if needed & set(eqn.outvars):
            needed |= {v for v in eqn.invars if is_var(v)}
            eqns.append(eqn)

    def run(*args: Any) -> list[Any]:
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        read = lambda v: env[v] if is_var(v) else v.val
        for eqn in reversed(eqns):
            with equation_context(eqn):
                env.update(zip(eqn.outvars, bind(eqn, [read(v) for v in eqn.invars]), strict=True))
        return [read(v) for v in outvars]

    return trace(run, *(v.aval for v in jaxpr.invars))


def producers(jaxpr: Any) -> dict[Any, Any]:
    """Return the equation that makes each variable of this program."""
    return {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}


def varying_dimensions(made: Mapping[Any, Any], atom: Any) -> list[int]:
    """Return the dimensions along which a value may vary: not those that it was broadcast to.

    Args:
      made: the producers of its program's variables.
      atom: the value.
    """
    eqn = made.get(atom) if is_var(atom) else None
    if eqn is None or eqn.primitive.name != "broadcast_in_dim":
        return list(range(atom.aval.ndim))
    dims = zip(eqn.params["broadcast_dimensions"], eqn.invars[0].aval.shape, strict=True)
    return [int(d) for d, size in dims if size == atom.aval.shape[d]]
