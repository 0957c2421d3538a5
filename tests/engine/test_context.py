"""The interpreter's state: what its four context managers change, they put back."""

import jax
import jax.numpy as jnp
import pytest

from lora_jax.engine.context import Context

ENTER = {
    "inside": lambda ctx: ctx.inside("equation"),
    "inside_program": lambda ctx: ctx.inside_program(jax.make_jaxpr(jnp.sin)(1.0).jaxpr),
    "inside_remat": Context.inside_remat,
    "inside_derivative": Context.inside_derivative,
}


def state(ctx):
    return ctx.enclosing, ctx.made, ctx.in_remat, ctx.in_derivative


@pytest.mark.parametrize("enter", ENTER.values(), ids=ENTER)
def test_an_exception_leaves_the_context_as_it_was(enter):
    ctx = Context()
    with pytest.raises(ZeroDivisionError), enter(ctx):
        raise ZeroDivisionError
    assert state(ctx) == state(Context())


@pytest.mark.parametrize("enter", ENTER.values(), ids=ENTER)
def test_the_inner_of_two_restores_the_outer_one(enter):
    ctx = Context()
    with ctx.inside("outer"), ctx.inside_remat(), ctx.inside_derivative():
        with enter(ctx):
            pass
        assert state(ctx) == ("outer", {}, True, True)
    assert state(ctx) == state(Context())
