"""Programs that the fuzzer (`python -m tests.stress.fuzz`) once found to be wrong."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.programs.table import case, normal


@case(layouts={"w": "io"}, reverse=False)
def while_loop_that_ends_for_each_example(dtype):
    """vmap gives each example its own condition, which `lax.while_loop` does not accept."""

    def fn(params, x, steps):
        def one(row, n):
            step = lambda carry: (carry[0] + 1, jnp.tanh(carry[1] @ params["w"]))
            return lax.while_loop(lambda carry: carry[0] < n, step, (0, row))[1]

        return jax.vmap(one)(x, steps)

    return fn, {"w": normal(1, (7, 7), dtype)}, (normal(0, (3, 7), dtype), jnp.array([2, 0, 3]))


@case(layouts={"w": "io"})
def custom_jvp_with_a_table(dtype):
    """Since JAX 0.12 the constants of a user-defined rule are its first inputs."""
    table = jnp.arange(5, dtype=dtype)

    @jax.custom_jvp
    def f(w, x):
        return jnp.tanh(x @ w)

    @f.defjvp
    def f_jvp(primals, tangents):
        (w, x), (dw, dx) = primals, tangents
        y = f(w, x)
        return y, table[None] * (1 - y**2) * (x @ dw + dx @ w)

    return (
        lambda params, x: f(params["w"], x),
        {"w": normal(1, (7, 5), dtype)},
        (normal(0, (3, 7), dtype),),
    )


@case(layouts={"left": "ooi"})
def two_weights_that_meet_along_different_axes(dtype):
    """The use of the left one was read off the right one's contracted axis."""

    def fn(params, x):
        product = lax.dot_general(params["left"], params["right"], (((2,), (0,)), ((), ())))
        return jnp.tanh(product[:, 0] @ x)

    params = {"left": normal(1, (3, 2, 7), dtype), "right": normal(2, (7, 5), dtype)}
    return fn, params, (normal(0, (5, 4), dtype),)


@case(layouts={"w": "io"})
def custom_jvp_of_a_weight_that_an_input_scales(dtype):
    """The base of such a view depends on the input: its tangent was taken for zero."""

    @jax.custom_jvp
    def f(w, x):
        return jnp.tanh(x @ w)

    @f.defjvp
    def f_jvp(primals, tangents):
        (w, x), (dw, dx) = primals, tangents
        y = f(w, x)
        return y, 3 * (1 - y**2) * (x @ dw + dx @ w)

    return (
        lambda params, x: f(params["w"] * jnp.sin(x[0, :5])[None], x),
        {"w": normal(1, (7, 5), dtype)},
        (normal(0, (3, 7), dtype),),
    )


@case(layouts={"w": "io"})
def custom_jvp_around_a_remat(dtype):
    """The rule's tangents go through the remat, and are transposed: nothing in them has a name."""

    @jax.custom_jvp
    def f(w, x):
        return jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(w, x)

    f.defjvp(lambda primals, dots: jax.jvp(jax.checkpoint(lambda w, x: x @ w), primals, dots))
    return (
        lambda params, x: f(params["w"], x),
        {"w": normal(1, (7, 5), dtype)},
        (normal(0, (3, 7), dtype),),
    )


@case(layouts={"w": "io"})
def custom_jvp_around_a_barrier_on_the_weight(dtype):
    """Both factors of its tangent shared the barrier, so JAX took their product for bilinear."""

    @jax.custom_jvp
    def f(w, x):
        return jnp.tanh(x @ lax.optimization_barrier(w))

    f.defjvp(lambda primals, dots: jax.jvp(f.fun, primals, dots))
    return (
        lambda params, x: f(params["w"], x),
        {"w": normal(1, (7, 5), dtype)},
        (normal(0, (3, 7), dtype),),
    )


# The barrier's output is counted as an array of the weight's size, and JAX makes it only later.
@case(layouts={"w": "io"}, shapes_collide=True)
def custom_jvp_around_the_gradient_of_a_remat(dtype):
    """There the barrier is the one before the recomputation."""

    @jax.custom_jvp
    def f(w, x):
        block = jax.checkpoint(lambda w, x: jnp.tanh(x @ w))
        return jax.grad(lambda x: block(w, x).sum())(x)

    f.defjvp(lambda primals, dots: jax.jvp(f.fun, primals, dots))
    return (
        lambda params, x: f(params["w"], x),
        {"w": normal(1, (7, 5), dtype)},
        (normal(0, (3, 7), dtype),),
    )


def on_two_devices(f, spec_w, spec_x, spec):
    """A program that runs `f(w, x)` on two devices."""

    def fn(params, x):
        mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
        mapped = jax.shard_map(f, mesh=mesh, in_specs=(spec_w, spec_x), out_specs=spec)
        return mapped(params["w"], x)

    return fn


@case(layouts={"w": "io"})
def custom_vjp_in_a_shard_map_with_an_output_that_no_one_uses(dtype):
    """The zero cotangent of that output must vary over the mesh as the output does."""

    def plain(w, x):
        return x @ w, x

    f = jax.custom_vjp(plain)
    f.defvjp(lambda *args: (plain(*args), args), lambda args, g: jax.vjp(plain, *args)[1](g))
    fn = on_two_devices(lambda w, x: lax.psum(f(w, x)[0], "d"), P("d"), P(None, "d"), P())
    return fn, {"w": normal(1, (8, 5), dtype)}, (normal(0, (3, 8), dtype),)


@case(layouts={"w": "io"})
def custom_jvp_in_a_shard_map_of_an_input_that_stands_still(dtype):
    """So must the zero tangent of what does not move."""

    @jax.custom_jvp
    def f(w, x):
        return jnp.tanh(x @ w)

    f.defjvp(lambda primals, dots: jax.jvp(f.fun, primals, dots))

    def half(w, x):
        return lax.psum(f(w, lax.stop_gradient(x)) + x[:, :1], "d")

    fn = on_two_devices(half, P("d"), P(None, "d"), P())
    return fn, {"w": normal(1, (8, 5), dtype)}, (normal(0, (3, 8), dtype),)


@case(layouts={"w": "io"}, dense="tanh")
def custom_jvp_of_a_weight_that_is_made_varying(dtype):
    """A tangent has no base that varies, so its factors must."""

    @jax.custom_jvp
    def f(w, x):
        return x @ lax.tanh(lax.pcast(w, ("d",), to="varying"))

    f.defjvp(lambda primals, dots: jax.jvp(f.fun, primals, dots))
    fn = on_two_devices(f, P(), P("d"), P("d"))
    return fn, {"w": normal(1, (7, 5), dtype)}, (normal(0, (4, 7), dtype),)


@case(layouts={"w": "bio"})
def few_rows_for_each_of_several_weights(dtype):
    """jaxlib 0.10 aborted: the layout of a transposed A reached a batched product."""
    return (
        lambda params, x: jnp.tanh(jnp.einsum("nti,nio->nto", x, params["w"])),
        {"w": normal(1, (4, 7, 5), dtype)},
        (normal(0, (4, 3, 7), dtype),),
    )
