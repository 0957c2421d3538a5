"""`argnum` and `argname`: a function whose first argument is not the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import ConfigError, LoraConfig
from tests.programs import normal, randomize

PARAMS = {"up": normal(1, (7, 12), "float32"), "down": normal(2, (12, 5), "float32")}
TUNED = {"up": PARAMS["up"] + normal(3, (7, 1), "float32"), "down": PARAMS["down"]}
X = normal(0, (3, 7), "float32")
CONFIG = LoraConfig(2)


def model(params, x, scale=1.0):
    return jnp.tanh(x @ params["up"]) @ params["down"] * scale


def second(x, params, scale=1.0):
    return model(params, x, scale)


def third(x, scale, params):
    return model(params, x, scale)


def named(x, *, params, scale=1.0):
    return model(params, x, scale)


#: function, where its parameters are, its other arguments
FORMS = [
    (second, {"argnum": 1}, (X,)),
    (third, {"argnum": 2}, (X, 1.0)),
    (named, {"argname": "params"}, (X,)),
    (second, {"argname": "params"}, (X,)),
]
VERBS = {
    "init": lambda fn, args, **at: lora_jax.init(
        jax.random.key(0), PARAMS, CONFIG, fn, *args, **at
    ),
    "extract": lambda fn, args, **at: lora_jax.extract(PARAMS, TUNED, CONFIG, fn, *args, **at)[0],
    "eva": lambda fn, args, **at: lora_jax.eva(
        fn, lora_jax.init(jax.random.key(0), PARAMS, CONFIG), [args], **at
    ),
    "lora_ga": lambda fn, args, **at: lora_jax.lora_ga(
        lambda *a, **k: (fn(*a, **k) ** 2).mean(),
        lora_jax.init(jax.random.key(0), PARAMS, CONFIG),
        [args],
        **at,
    ),
}


#: A verb with every form, and every verb with a form.
DEFAULT = {(verb, 2) for verb in VERBS} | {("init", form) for form in range(len(FORMS))}


@pytest.mark.parametrize(
    ("verb", "form"),
    [
        pytest.param(verb, form, marks=[] if (verb, form) in DEFAULT else pytest.mark.slow)
        for verb in VERBS
        for form in range(len(FORMS))
    ],
)
def test_it_is_as_if_the_parameters_were_first(verb, form, quick_compile):
    fn, at, args = FORMS[form]
    want = VERBS[verb](model, (X,))
    jax.tree.map(np.testing.assert_array_equal, VERBS[verb](fn, args, **at), want)


def test_lora_takes_the_adapted_tree_wherever_it_is(quick_compile):
    adapted = randomize(VERBS["init"](second, (X,), argnum=1))
    want = model(lora_jax.merge(adapted), X)
    np.testing.assert_allclose(lora_jax.lora(second)(X, adapted), want, atol=1e-5)
    np.testing.assert_allclose(lora_jax.lora(named)(X, params=adapted), want, atol=1e-5)
    np.testing.assert_allclose(lora_jax.lora(third)(X, 1.0, adapted), want, atol=1e-5)


def test_memory_report():
    adapted = VERBS["init"](second, (X,), argnum=1)
    loss = lambda params, x: (lora_jax.lora(model)(params, x) ** 2).mean()
    want = lora_jax.memory_report(loss, adapted, X)
    assert lora_jax.memory_report(lambda x, p: loss(p, x), adapted, X, argnum=1) == want


@pytest.mark.parametrize(
    ("fn", "args", "at", "message"),
    [
        (second, (X,), {"argnum": -1}, "argnum must be 0 or a positive integer, got -1"),
        (second, (X,), {"argnum": "x"}, "argnum must be 0 or a positive integer, got 'x'"),
        (second, (X,), {"argnum": 1, "argname": "params"}, "argnum or argname, not both"),
        (second, (X,), {"argname": 1}, "argname must be a name, got 1"),
        (third, (X,), {"argnum": 2}, "argnum=2, but 1 other arguments are given"),
        (named, (X,), {"argname": "scale", "scale": 1.0}, "leave it out of the other ones"),
    ],
)
def test_what_has_no_meaning_is_refused(fn, args, at, message):
    with pytest.raises(ConfigError, match=message):
        VERBS["init"](fn, args, **at)
