"""What tracing costs, without a clock: calls of the function, equations, derivatives taken."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import source_info_util
from jax.interpreters import ad

import lora_jax
from lora_jax.engine.jaxprs import is_var
from tests.programs import merged, normal, randomize

LAYERS, WIDTH, RANK = 6, 8, 2
NAMES = ("q", "k", "up", "down")


def block(x, p, product):
    """Products between stretches of several equations, two of them of one activation."""
    h = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    x = x + jnp.tanh(product(h, p["q"])) * jnp.exp(-(product(h, p["k"]) ** 2))
    return x + product(jnp.sin(product(x, p["up"]) / 2), p["down"])


def loss(params, x, product=jnp.matmul):
    for p in params:
        x = block(x, p, product)
    return (x * x).sum()


def by_hand(pairs, params, x):
    merged = [{n: (p[n], *ab[n]) for n in NAMES} for p, ab in zip(params, pairs, strict=True)]
    return loss(merged, x, lambda x, w: x @ w[0] + (x @ w[1]) @ (2.0 * w[2]))


def model(layers=LAYERS, width=WIDTH):
    params = [{n: normal(i, (width, width), jnp.float32) for n in NAMES} for i in range(layers)]
    x = jnp.ones((3, width))
    config = lora_jax.LoraConfig(rank=RANK, alpha=2.0 * RANK)
    return params, randomize(lora_jax.init(jax.random.key(1), params, config, loss, x)), x


def gradient_of(layers=LAYERS, width=WIDTH):
    """Return the gradient of the adapters and its arguments; its functions are new to JAX."""
    _, adapted, x = model(layers, width)
    base, adapters = lora_jax.split(adapted)
    step = lambda a, base, x: lora_jax.lora(loss, on_dense="error")(lora_jax.join(base, a), x)
    return jax.value_and_grad(step), (adapters, base, x)


def distinct(program, seen):
    """Yield the equations of a program and of those in it, a program that is called twice once."""
    jaxpr = getattr(program, "jaxpr", program)
    if id(jaxpr) in seen:
        return
    seen[id(jaxpr)] = jaxpr
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                    yield from distinct(inner, seen)


def test_the_function_is_traced_once():
    calls = []

    def counted(params, x):
        calls.append(1)
        return loss(params, x)

    _, adapted, x = model()
    jax.jit(jax.grad(lora_jax.lora(counted))).trace(adapted, x)
    assert len(calls) == 1


def test_there_are_no_more_equations_than_by_hand():
    """Products of equal shapes are one program, so that each costs JAX a single equation."""
    fn, args = gradient_of()
    mine = [*distinct(jax.make_jaxpr(fn)(*args).jaxpr, {})]
    params, adapted, x = model()
    pairs = [{n: (p[n].a, p[n].b) for n in NAMES} for p in adapted]
    theirs = [*distinct(jax.make_jaxpr(jax.value_and_grad(by_hand))(pairs, params, x).jaxpr, {})]
    assert len(mine) <= len(theirs)


def derivatives(monkeypatch, layers, width):
    """Count the derivatives of single equations that JAX takes while it traces the gradient."""
    fn, args = gradient_of(layers, width)
    taken = collections.Counter()

    def counted(primitive, rule):
        def call(*args, **params):
            taken[primitive] += 1
            return rule(*args, **params)

        return call

    with monkeypatch.context() as patch:
        for primitive, rule in [*ad.primitive_jvps.items()]:
            patch.setitem(ad.primitive_jvps, primitive, counted(primitive, rule))
        jax.make_jaxpr(fn)(*args)
    return taken.total()


def test_equal_layers_are_differentiated_once(monkeypatch):
    few = derivatives(monkeypatch, layers=2, width=10)
    many = derivatives(monkeypatch, layers=10, width=11)  # of another width: nothing is in caches
    assert few > 20
    assert many - few < 10


def spelled(program, scope=""):
    """Yield (primitive, line, name scopes, literals) of each equation, those of stretches too."""
    for eqn in program.eqns:
        name = eqn.params.get("name", eqn.primitive.name)
        inside = f"{scope}/{eqn.source_info.name_stack}".strip("/")
        if name == "stretch":  # JAX inlines it now or, from 0.12 on, when it lowers the program
            yield from spelled(eqn.params["jaxpr"], inside)
        line = re.sub(r":(\d+):\d+ ", r":\1 ", source_info_util.summarize(eqn.source_info))
        yield name, line, inside, [str(a) for a in eqn.invars if not is_var(a)]


def scoped(params, x):
    """Equations on several lines, in name scopes, with literals of either sign of zero."""
    clip = lambda x, floor: jnp.maximum(jnp.sin(x), floor) * 2
    with jax.named_scope("first"):
        x = clip(x, 0.0)
    with jax.named_scope("second"):
        x = clip(x, -0.0)
        return (jnp.sin(x) * 3 @ params["w"]).sum()


def test_source_lines_and_name_scopes_stay():
    params, x = {"w": jnp.ones((4, 4))}, jnp.ones((3, 4))
    adapted = lora_jax.init(jax.random.key(0), params, lora_jax.LoraConfig(rank=1), scoped, x)

    def seen(fn, params):
        program = jax.make_jaxpr(jax.vmap(fn, (None, 0)))(params, x).jaxpr
        return [e for e in spelled(program) if e[0] in ("max", "mul", "sin") and "scoped" in e[1]]

    assert len(seen(scoped, params)) > 6
    assert seen(lora_jax.lora(scoped), adapted) == seen(scoped, params)


def test_only_stretches_that_compute_the_same_are_equal():
    """The same line and shapes with other literals, parameters or inputs: other values."""

    one, two, three = (0, 0, 1), (0, 1, 1), (1, 0, 0)
    first = (2.0, 2, one)  # the rest differ from it in one thing, the last in what is read later
    steps = [first, (0.0, 2, one), (-0.0, 2, one), (2.0, 3, one), (2.0, 2, two), (2.0, 2, three)]

    def fn(params, x):
        h = x
        for c, power, read in (*steps, first):
            h, g = h @ params["w"], h
            a, b, d = ((h, g)[i] for i in read)
            sign = jnp.copysign(1.0, jnp.abs(g) * c)
            h, sine = jnp.tanh(lax.integer_pow(a, power) * b - (s := jnp.sin(d))) * sign, s
        return (h + sine).sum()

    params, x = {"w": normal(0, (4, 4), jnp.float32)}, normal(1, (3, 4), jnp.float32)
    adapted = randomize(
        lora_jax.init(jax.random.key(0), params, lora_jax.LoraConfig(rank=1), fn, x)
    )
    got = jax.jit(jax.value_and_grad(lambda x: lora_jax.lora(fn)(adapted, x)))(x)
    want = jax.jit(jax.value_and_grad(lambda x: fn(merged(adapted), x)))(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
