"""Every verb on a quantized base, against the same verb on its dequantized values."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from lora_jax.core.quantized.weight import is_quantized
from tests.adapters.quantized import tiny
from tests.adapters.quantized.tiny import IDS, KEY, adapted, base, dense, loss, model


def assert_close(got, want, rtol=1e-5):
    check = lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)
    jax.tree.map(check, got, want)


SLOW = pytest.mark.slow
CONFIGS = [
    lora.LoraConfig(rank=2, dora=True, bias="all", rows={"table": [1, 3]}),
    pytest.param(
        lora.LoraConfig(rank=2, targets=["down"], train=["table", "up/kernel"]), marks=SLOW
    ),
    pytest.param(lora.LoraConfig(rank=2, targets=["table", "down"]), marks=SLOW),
    pytest.param(lora.LoraConfig(rank=2, layers=[1]), marks=SLOW),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_init_split_join_and_norms(config):
    got, want = adapted(base(), config), adapted(dense(), config)
    codes, overlay = lora.split(got)
    assert all(a is b for a, b in zip(jax.tree.leaves(codes), jax.tree.leaves(base()), strict=True))
    assert_close(overlay, lora.split(want)[1])
    assert_close(*(jax.jit(lora.norms)(tree) for tree in (got, want)))
    shapes = jax.eval_shape(lambda p: p, base())
    like = lora.init(KEY, shapes, config, model, IDS)
    assert jax.tree.structure(like) == jax.tree.structure(got)
    assert jax.tree.leaves(like) == jax.tree.leaves(jax.eval_shape(lambda p: p, got))
    assert lora.count_params(got) == lora.count_params(want)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_a_step_of_each_form(config):
    (codes, overlay), (values, other) = (lora.split(adapted(p, config)) for p in (base(), dense()))
    step = jax.jit(jax.value_and_grad(lambda overlay, base: loss(lora.join(base, overlay))))
    assert_close(step(overlay, codes), step(other, values), rtol=1e-4)


def test_what_is_counted_and_reported():
    joined = tiny.joined()
    assert lora.count_params(base()) == lora.count_params(dense())
    text = lora.summary(joined, model, IDS)
    assert "int8: 1 weight, 640 numbers in 680 bytes (8.50 bits each)" in text
    assert "int4: 2 weights, 24,576 numbers in 13,824 bytes (4.50 bits each)" in text
    assert "looked up by `gather`" in text  # the table, which is not adapted
    assert lora.summary(base()).endswith("all params: 25,408 || trainable%: 0.0000")
    report = lora.memory_report(loss, joined)
    float_base = 4 * lora.count_params(dense()).total
    assert (report.adapted.base, report.full.base) == (680 + 13_824 + 4 * 192, float_base)
    assert report.full.optimizer > 2 * float_base > 10 * report.adapted.optimizer


def test_labels_have_the_structure_of_the_tree():
    joined = tiny.joined()
    for tree in (lora.labels(joined), lora.mask(joined), lora.shardings(joined)):
        assert jax.tree.structure(tree) == jax.tree.structure(joined)
    frozen, overlay = lora.split(lora.labels(joined))
    assert set(jax.tree.leaves(frozen)) == {"freeze"}
    assert set(jax.tree.leaves(overlay)) == {"freeze", "train"}


def test_switches():
    joined, off = tiny.joined(), model(dense(), IDS)
    run = jax.jit(lora.lora(model))
    np.testing.assert_allclose(run(lora.disable(joined), IDS), off, atol=1e-5)
    half = lora.set_scale(joined, 0.5)
    np.testing.assert_allclose(
        run(half, IDS), run(lora.set_scale(adapted(dense()), 0.5), IDS), atol=1e-5
    )
    assert run._cache_size() == 2
    assert_close(lora.dequantize(lora.merge(joined)), lora.merge(adapted(dense())))
    dropout = lora.init(KEY, base(), lora.LoraConfig(rank=2, dropout=0.5), model, IDS)
    assert lora.with_dropout(dropout, KEY)["layers"]["up"]["kernel"].key is not None


OPTIMIZERS = {
    "freeze": lambda p: lora.freeze(optax.adamw(0.1), p),
    "clipped": lambda p: lora.freeze(
        optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1)), p
    ),
    "lora_plus": lambda p: lora.lora_plus(0.1, p),
    "groups": lambda p: lora.groups({"up": optax.sgd(1.0)}, p, default=optax.adam(0.1)),
}


@pytest.mark.parametrize(
    "name", [n if n == "clipped" else pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS]
)
def test_joined_trees_train_as_overlays_do(name):
    joined = tiny.joined()
    codes, overlay = lora.split(joined)

    def step(params, loss, apply_updates):
        tx = OPTIMIZERS[name](params)
        grads = jax.grad(loss, allow_int=True)(params)  # of integers: nothing, of dtype float0
        updates, _ = tx.update(grads, tx.init(params), params)
        return apply_updates(params, updates)

    want = jax.jit(lambda o: step(o, lambda o: loss(lora.join(codes, o)), lora.apply_updates))(
        overlay
    )
    for apply_updates in (lora.apply_updates, optax.apply_updates):
        new = jax.jit(lambda p, apply=apply_updates: step(p, loss, apply))(joined)
        frozen, got = lora.split(new)
        assert_close(got, want)
        jax.tree.map(np.testing.assert_array_equal, frozen, codes)
    with pytest.raises(TypeError, match="allow_int"):
        jax.grad(loss)(joined)


def test_extract_reads_the_values():
    up = {"up": base()["layers"]["up"]["kernel"]}
    tuned = jax.tree.map(lambda x: x + 0.1, tiny.plain()["layers"]["up"]["kernel"])
    config = lora.LoraConfig(rank=2, overrides={"up": {"layout": "bio"}})
    overlay, residuals = lora.extract(up, {"up": tuned}, config)
    change = np.float64(tuned) - np.float64(lora.dequantize(up)["up"])
    a, b, scale = (np.float64(getattr(overlay["up"], name)) for name in ("a", "b", "scale"))
    left = change - scale[:, None, None] * (a @ b)
    np.testing.assert_allclose(
        residuals["up"], np.linalg.norm(left) / np.linalg.norm(change), rtol=1e-6
    )
    sizes = np.linalg.svd(change, compute_uv=False) ** 2
    best = (sizes[:, 2:].sum() / sizes.sum()) ** 0.5  # the SVD is a randomized one
    assert best <= residuals["up"] <= 1.002 * best


def test_the_message_of_a_quantized_weight():
    with pytest.raises(
        lora.StructureError,
        match=r"QuantizedWeight\(float32\[10,64\], int8.*"
        r"lora_jax.lora\(fn\).*lora_jax.dequantize\(params\)",
    ):
        base()["table"] + 1
    for use in (lambda w: w.T, lambda w: w.astype("float32"), lambda w: w.reshape(-1)):
        with pytest.raises(
            AttributeError, match="is a quantized weight, and this function takes it"
        ):
            use(base()["table"])
    assert is_quantized(base()["table"]) and not hasattr(base()["table"], "nothing")


@pytest.mark.slow
def test_eva_reads_inputs():
    trees = [lora.init(KEY, tree, tiny.CONFIG, model, IDS) for tree in (base(), dense())]
    made = [lora.eva(model, tree, [(IDS,), (IDS + 3,)]) for tree in trees]
    got, want = (jax.tree.map(abs, lora.split(tree)[1]) for tree in made)
    assert_close(got, want, rtol=1e-5)


def test_lora_ga_needs_floating_weights():
    tree = lora.init(KEY, base(), tiny.CONFIG, model, IDS)
    with pytest.raises(lora.TargetError, match=r"up/kernel: .*codes of int4 cannot hold"):
        lora.lora_ga(lambda params, ids: (model(params, ids) ** 2).mean(), tree, [(IDS,)])
    head = lambda params, x: ((x @ params["up"] @ params["down"]) ** 2).mean()
    shapes = {"up": (64, 32), "down": (32, 8)}
    params = {name: jax.random.normal(KEY, shape) for name, shape in shapes.items()}
    x, config = jax.random.normal(KEY, (3, 64)), lora.LoraConfig(rank=2, targets=["down"])
    params = lora.quantize(params, "int4", targets=["up"])
    made = lora.lora_ga(head, lora.init(KEY, params, config, head, x), [(x,)])
    assert made["up"] is params["up"] and jnp.abs(made["down"].b).max() > 0
