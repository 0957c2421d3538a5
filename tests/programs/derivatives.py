"""Functions with a user-defined derivative, off by a factor so that one sees which is used."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from tests.programs.table import case, normal


@case(layouts={"w": "io"})
def custom_jvp(dtype):
    @jax.custom_jvp
    def f(w, x):
        return jnp.tanh(x @ w)

    @f.defjvp
    def f_jvp(primals, tangents):
        (w, x), (dw, dx) = primals, tangents
        y = f(w, x)
        return y, 3 * (1 - y**2) * (x @ dw + dx @ w)  # three times the true one: told apart

    return (
        lambda params, x: f(params["w"], x),
        {"w": normal(1, (7, 5), dtype)},
        (normal(0, (3, 7), dtype),),
    )


def five_fold(dtype, **options):
    """tanh(x @ w) · k, with a derivative that is five times the true one."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def f(w, x, k):
        return jnp.tanh(x @ w) * k

    def fwd(w, x, k):
        if options:
            w, x = w.value, x.value
        return f(w, x, k), (w, x)

    def bwd(k, saved, g):
        w, x = saved
        g = 5 * g * k * (1 - jnp.tanh(x @ w) ** 2)
        return x.T @ g, g @ w.T

    f.defvjp(fwd, bwd, **options)
    return f


@case(layouts={"w": "io"})
def custom_vjp(dtype):
    f = five_fold(dtype)
    return (
        lambda params, x: f(params["w"], x, 2),
        {"w": normal(1, (7, 5), dtype)},
        (normal(0, (3, 7), dtype),),
    )


@case(layouts={"w": "io"})
def custom_vjp_with_symbolic_zeros(dtype):
    f = five_fold(dtype, symbolic_zeros=True)
    return (
        lambda params, x: f(params["w"], x, 2),
        {"w": normal(1, (7, 5), dtype)},
        (normal(0, (3, 7), dtype),),
    )


@case(layouts={"w": "boi"})
def custom_vjp_in_a_scan(dtype):
    f = five_fold(dtype)
    return (
        lambda params, x: lax.scan(lambda h, w: (f(w.T, h, 2), h.sum()), x, params["w"]),
        {"w": normal(1, (3, 7, 7), dtype)},
        (normal(0, (4, 7), dtype),),
    )


@case(layouts={"w": "io", "v": "io"})
def custom_vjp_with_an_integer(dtype):
    """Two weights, an argument and an output of integers; the ends are not used alike."""

    @jax.custom_vjp
    def f(w, v, i, x):
        y = x @ w
        return y[i] @ v, y.argmax(-1)

    def fwd(w, v, i, x):
        return f(w, v, i, x), (w, v, i, x)

    def bwd(saved, g):
        w, v, i, x = saved
        h = jnp.zeros((x.shape[0], w.shape[1]), x.dtype).at[i].add(3 * g[0] @ v.T)
        return x.T @ h, -(x @ w)[i].T @ g[0], None, h @ w.T

    f.defvjp(fwd, bwd)
    return (
        lambda params, x, i: f(params["w"], params["v"], i, x),
        {"w": normal(1, (7, 5), dtype), "v": normal(2, (5, 11), dtype)},
        (normal(0, (3, 7), dtype), jnp.array([2, 0])),
    )


@case(layouts={"w": "io"})
def custom_gradient(dtype):
    def fn(params, x):
        @jax.custom_gradient
        def f(w, x):
            y = jnp.tanh(x @ w)
            return y, lambda g: (3 * x.T @ (g * (1 - y**2)), (g * (1 - y**2)) @ w.T)

        return f(params["w"], x)

    return fn, {"w": normal(1, (7, 5), dtype)}, (normal(0, (3, 7), dtype),)
