"""Views know which parameters they come from, whatever those are called."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.engine.layout_inference import infer_uses
from tests.programs import normal, randomize
from tests.programs.table import merged

#: Names that could not be told apart, were paths joined to one string and split again.
NAMES = {"or": ("a or b", "a", "c"), "plus": ("a + b", "a", "c"), "both": ("a or b + c", "a", "b")}


def conditional(first, second, third, x):
    chosen = jax.lax.cond(x.sum() > 0, lambda: first, lambda: second)
    return x @ chosen + x @ third


def selected(first, second, third, x):
    return x @ jnp.where(x.sum() > 0, first, second) + x @ third


def concatenated(first, second, third, x):
    return x @ jnp.concatenate([first, second, third], axis=1)


def joined_choice(first, second, third, x):
    return x @ joined(first, second, third, x)


def joined(first, second, third, x):
    """One of two weights, joined with a third."""
    chosen = jax.lax.cond(x.sum() > 0, lambda: first, lambda: second)
    return jnp.concatenate([chosen, third], axis=1)


def adapt(program, names, x):
    params = {name: normal(i, (8, 6), jnp.float32) for i, name in enumerate(names)}
    fn = lambda params, x: program(*(params[name] for name in names), x)
    config = lora_jax.LoraConfig(rank=1)
    return fn, params, randomize(lora_jax.init(jax.random.key(0), params, config, fn, x))


@pytest.mark.parametrize("program", [conditional, selected, concatenated, joined_choice])
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_a_parameter_may_have_any_name(program, names, quick_compile):
    """Each has one use, its layout and its update, whatever separators its name contains."""
    x = normal(9, (5, 8), jnp.float32)
    fn, params, adapted = adapt(program, names, x)
    uses = infer_uses(fn, params, (x,), {})
    assert {name: len(found) for name, found in uses.items()} == dict.fromkeys(names, 1)
    assert [adapted[name].layout.axes for name in names] == ["io"] * 3
    got = lora_jax.lora(fn, on_dense="error")(adapted, x)
    np.testing.assert_allclose(got, fn(merged(adapted), x), atol=1e-5)


def test_a_message_names_every_parameter():
    """Alternatives are joined by "or", parts by "+"."""
    x = normal(9, (5, 8), jnp.float32)
    _, _, adapted = adapt(joined_choice, ("a", "b", "c"), x)
    sine = lambda params, x: jnp.sin(joined(*params.values(), x))
    with pytest.raises(lora_jax.DenseError, match=r"^b or a \+ c: `sin`"):
        lora_jax.lora(sine, on_dense="error")(adapted, x)
