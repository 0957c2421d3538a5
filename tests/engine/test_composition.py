"""`lora` under JAX's other transformations: nested, ahead of time, exported, many adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.programs import adapt, merged, normal, randomize

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(0)
TOKENS, WIDTH, HIDDEN, ADAPTERS, RANK = 32, 64, 48, 3, 2
X = normal(0, (TOKENS, WIDTH), jnp.float32) / 8
PARAMS = {
    "up": normal(1, (WIDTH, HIDDEN), jnp.float32),
    "down": normal(2, (HIDDEN, WIDTH), jnp.float32),
}


def model(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def adapted(seed=0):
    config = lora_jax.LoraConfig(rank=RANK)
    params = randomize(lora_jax.init(jax.random.key(seed), PARAMS, config, model, X))
    return jax.tree.map(lambda x: x / 4, params)


# --- nested ---------------------------------------------------------------------------------------


def test_lora_inside_lora():
    """A frozen teacher that has its own adapters, inside a function that is adapted too."""
    student, teacher = adapted(1), adapted(2)
    inner = lora_jax.lora(model, on_dense="error")

    def distance(params, x):
        return ((model(params, x) - inner(teacher, x)) ** 2).mean()

    outer = lora_jax.lora(distance, on_dense="error")
    want = ((model(merged(student), X) - model(merged(teacher), X)) ** 2).mean()
    np.testing.assert_allclose(jax.jit(outer)(student, X), want, rtol=1e-4)
    np.testing.assert_array_equal(
        jax.jit(lora_jax.lora(lora_jax.lora(model)))(student, X),
        jax.jit(lora_jax.lora(model))(student, X),
    )
    # and the gradient of the inner one, as an argument that the outer one does not adapt
    grads = jax.grad(lambda t: outer(PARAMS, X) + inner(t, X).sum())(teacher)
    want = jax.grad(lambda t: inner(t, X).sum())(teacher)
    np.testing.assert_allclose(grads["up"].a, want["up"].a, rtol=1e-5)


def test_both_arguments_are_adapted():
    student, teacher = adapted(1), adapted(2)
    apply = lora_jax.lora(lambda p, q, x: model(p, x) - model(q, x), on_dense="error")
    want = model(merged(student), X) - model(merged(teacher), X)
    np.testing.assert_allclose(apply(student, teacher, X), want, atol=1e-4)


# --- ahead of time, exported ----------------------------------------------------------------------


def test_ahead_of_time():
    """Lowered and compiled on shapes alone, then run."""
    params = adapted()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, X))
    compiled = jax.jit(lora_jax.lora(model, on_dense="error")).lower(*shapes).compile()
    np.testing.assert_array_equal(compiled(params, X), jax.jit(lora_jax.lora(model))(params, X))


@pytest.mark.parametrize("differentiate", [False, True], ids=["value", "gradient"])
def test_exported_for_any_number_of_tokens(differentiate):
    """One exported program for every batch; adapters are its arguments, so they can be swapped."""
    run = lora_jax.lora(model, on_dense="error")
    fn = jax.grad(lambda p, x: (run(p, x) ** 2).sum()) if differentiate else run
    tokens = jax.export.symbolic_shape("tokens")[0]
    params = adapted()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    x = jax.ShapeDtypeStruct((tokens, WIDTH), X.dtype)
    data = jax.export.export(jax.jit(fn))(shapes, x).serialize(vjp_order=0)
    restored = jax.export.deserialize(data)
    for each, x in ((params, X), (adapted(3), X[:5])):
        got, want = restored.call(each, x), jax.jit(fn)(each, x)
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4), got, want)


# --- one base, many adapters ----------------------------------------------------------------------


def dots(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for value in eqn.params.values():
            if hasattr(getattr(value, "jaxpr", value), "eqns"):
                yield from dots(getattr(value, "jaxpr", value))


@pytest.mark.parametrize("batched", [False, True], ids=["one_input", "an_input_each"])
def test_many_adapters_share_the_base_product(batched):
    """`vmap` over adapters: every product with the base is one matmul, not batched over them."""
    base, _ = lora_jax.split(adapted())
    several = [lora_jax.split(adapted(seed))[1] for seed in range(ADAPTERS)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    apply = lora_jax.lora(lambda params, x: x @ params["up"], on_dense="error")
    xs = jnp.stack([X * i for i in range(1, 1 + ADAPTERS)]) if batched else X
    mapped = jax.vmap(
        lambda adapters, base, x: apply(lora_jax.join(base, adapters), x),
        in_axes=(0, None, 0 if batched else None),
    )
    lowered = jax.jit(mapped).lower(stacked, base, xs)

    of_base = [
        eqn
        for eqn in dots(jax.make_jaxpr(mapped)(stacked, base, xs).jaxpr)
        if (WIDTH, HIDDEN) in [v.aval.shape for v in eqn.invars]
    ]
    (eqn,) = of_base
    (_, contracted), batch = eqn.params["dimension_numbers"]
    assert batch == ((), ()) and tuple(contracted) == (0,)
    rows = TOKENS * (ADAPTERS if batched else 1)
    compiled = lowered.compile()
    assert f"f32[{rows},{HIDDEN}]" in compiled.as_text()  # [n·T, K] x [K, N], one dot

    floor = 2 * rows * WIDTH * HIDDEN + ADAPTERS * 2 * TOKENS * RANK * (WIDTH + HIDDEN)
    elementwise = ADAPTERS * (TOKENS * HIDDEN + RANK * HIDDEN)  # the sum, and the scale in B
    assert compiled.cost_analysis()["flops"] <= floor + elementwise

    for i, adapters in enumerate(several):
        want = (xs[i] if batched else xs) @ merged(lora_jax.join(base, adapters))["up"]
        np.testing.assert_allclose(compiled(stacked, base, xs)[i], want, rtol=1e-3, atol=1e-4)


def test_many_adapters_of_a_deep_model_share_every_base_product():
    """After the first layer the activations differ, and the base products are still plain."""
    base, _ = lora_jax.split(adapted())
    several = [lora_jax.split(adapted(seed))[1] for seed in range(ADAPTERS)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    run = lora_jax.lora(model, on_dense="error")

    def losses(stacked):
        one = lambda a: (run(lora_jax.join(base, a), X) ** 2).sum()
        return jax.vmap(one)(stacked)

    shapes = {w.shape for w in PARAMS.values()}
    traced = jax.make_jaxpr(jax.grad(lambda s: losses(s).sum()))(stacked).jaxpr
    of_base = [e for e in dots(traced) if shapes & {v.aval.shape for v in e.invars}]
    assert len(of_base) == 3  # up, down, and the way back through down
    assert {e.params["dimension_numbers"][1] for e in of_base} == {((), ())}
    want = [(model(merged(lora_jax.join(base, a)), X) ** 2).sum() for a in several]
    np.testing.assert_allclose(losses(stacked), jnp.stack(want), rtol=1e-3)


def test_gradients_of_adapters_mapped_with_their_few_rows():
    """One adapter per example: jaxlib 0.10 aborted the process with two or three rows each."""

    def fn(params, x):
        return jnp.tanh(x @ params["w"])

    x = normal(0, (4, 3, 7), jnp.float32)
    params = adapt((fn, {"w": normal(1, (7, 5), jnp.float32)}, (x[0],)), {"w": "io"}, jnp.float32)
    base, adapters = lora_jax.split(params)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, 3 * leaf, leaf]), adapters)

    def ours(adapters, x):
        return lora_jax.lora(fn)(lora_jax.join(base, adapters), x)

    def oracle(adapters, x):
        return fn(merged(lora_jax.join(base, adapters)), x)

    def grads(one):
        loss = lambda adapters, x: jnp.sin(jax.vmap(one)(adapters, x)).sum()
        return jax.jit(jax.grad(loss, (0, 1)))(stacked, x)

    got, want = grads(ours), grads(oracle)
    for name in ("a", "b"):
        np.testing.assert_allclose(
            getattr(got[0]["w"], name), getattr(want[0]["w"], name), atol=1e-4
        )
    np.testing.assert_allclose(got[1], want[1], atol=1e-4)
