"""Masks, labels and `freeze`: adapters train, and nothing else moves by a bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax import ConfigError, LoraConfig, StructureError, TargetError
from tests.devices import temporary_bytes
from tests.programs import is_node, normal

KEY = jax.random.key(0)
PARAMS = {
    "up": {"kernel": normal(1, (7, 9), jnp.float32), "bias": jnp.zeros(9)},
    "norm": {"scale": jnp.ones(9)},
    "down": {"kernel": normal(2, (9, 3), jnp.float32)},
}


def model(params, x):
    h = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
    return (h * params["norm"]["scale"][None]) @ params["down"]["kernel"]


X, Y = normal(3, (16, 7), jnp.float32), normal(4, (16, 3), jnp.float32)
CONFIG = LoraConfig(rank=2, train=["up/bias"])
JOINED = lora_jax.init(KEY, PARAMS, CONFIG, model, X)


def loss(params, x, y):
    return ((lora_jax.lora(model)(params, x) - y) ** 2).mean()


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def test_mask_and_labels():
    mask, labels = lora_jax.mask(JOINED), lora_jax.labels(JOINED)
    node = mask["up"]["kernel"]
    assert (node.w, node.a, node.b, node.scale) == (False, True, True, False)
    assert (mask["up"]["bias"].w, mask["up"]["bias"].value) == (False, True)
    assert mask["norm"]["scale"] is False
    assert jax.tree.map(lambda label: label == "train", labels) == mask
    assert jax.tree.structure(mask) == jax.tree.structure(JOINED)


def test_optax_takes_mask_and_labels():
    masked = optax.chain(
        optax.masked(optax.sgd(1.0), lora_jax.mask(JOINED)),
        optax.masked(optax.set_to_zero(), jax.tree.map(lambda m: not m, lora_jax.mask(JOINED))),
    )
    ones = jax.tree.map(jnp.ones_like, JOINED)
    updates, _ = masked.update(ones, masked.init(JOINED), JOINED)
    assert (
        float(updates["up"]["kernel"].a[0, 0]) == -1 and float(updates["up"]["kernel"].w[0, 0]) == 0
    )


def test_no_optimizer_state_for_frozen_leaves():
    state = lora_jax.freeze(optax.adam(1e-3), JOINED).init(JOINED)
    trained = lora_jax.count_params(JOINED).trainable
    assert count(state) == 2 * trained + 1  # two moments and a step counter


def train(form, tx, steps=100):
    """Losses and the final tree of 100 steps in the joined or the split form."""
    base, adapters = lora_jax.split(JOINED)
    params = JOINED if form == "joined" else adapters
    tx = lora_jax.freeze(tx, params)

    @jax.jit
    def step(params, state, base):
        whole = lambda p: p if form == "joined" else lora_jax.join(base, p)
        value, grads = jax.value_and_grad(lambda p: loss(whole(p), X, Y))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(steps):
        params, state, value = step(params, state, base)
        losses.append(float(value))
    return losses, params if form == "joined" else lora_jax.join(base, params)


# Weight decay and clipping are where a mask that misses a leaf would show.
TX = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(3e-2, weight_decay=0.1))


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("form", ["joined", "split"])
def test_the_base_is_bit_identical_after_100_steps(form):
    losses, params = train(form, TX)
    assert losses[-1] < 0.5 * losses[0]
    base, _ = lora_jax.split(params)
    jax.tree.map(np.testing.assert_array_equal, base, PARAMS)
    for path in (("up", "kernel"), ("down", "kernel")):
        node, start = params[path[0]][path[1]], JOINED[path[0]][path[1]]
        np.testing.assert_array_equal(node.scale, start.scale)
        assert float(jnp.abs(node.a - start.a).max()) > 1e-3
        assert float(jnp.abs(node.b).max()) > 1e-3
    assert float(jnp.abs(params["up"]["bias"].value).max()) > 1e-3


def test_both_forms_take_the_same_steps():
    joined, _ = train("joined", TX, steps=20)
    split, _ = train("split", TX, steps=20)
    np.testing.assert_allclose(joined, split, rtol=1e-6)


def test_a_naive_gradient_without_freeze_gives_frozen_leaves_zero():
    grads = jax.jit(jax.grad(loss))(JOINED, X, Y)
    frozen, _ = lora_jax.split(grads)
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), frozen)
    moved = optax.apply_updates(JOINED, jax.tree.map(lambda g: -0.1 * g, grads))
    jax.tree.map(np.testing.assert_array_equal, lora_jax.split(moved)[0], PARAMS)


def test_the_clipped_norm_counts_trained_leaves_alone():
    """Gradients of all ones: the norm is the root of the number of trained parameters."""
    ones = jax.tree.map(jnp.ones_like, JOINED)
    tx = lora_jax.freeze(optax.clip_by_global_norm(1.0), JOINED)
    updates, _ = tx.update(ones, tx.init(JOINED), JOINED)
    want = 1 / np.sqrt(lora_jax.count_params(JOINED).trainable)
    np.testing.assert_allclose(updates["down"]["kernel"].a, want, rtol=1e-6)
    naive = optax.tree.norm(jax.grad(loss)(JOINED, X, Y))
    trained = [
        x
        for n in jax.tree.leaves(jax.grad(loss)(JOINED, X, Y), is_leaf=is_node)
        if is_node(n)
        for x in ((n.a, n.b) if isinstance(n, lora_jax.LoraWeight) else (n.value,))
    ]
    np.testing.assert_allclose(naive, optax.tree.norm(trained), rtol=1e-6)


def test_freeze_refuses_a_tree_without_adapters():
    with pytest.raises(StructureError, match="no adapters"):
        lora_jax.freeze(optax.sgd(1.0), PARAMS)


# --- which of the factors train, and how fast -----------------------------------------------------


def ones(params):
    return jax.tree.map(jnp.ones_like, params)


def updates_of(tx, params=JOINED):
    return tx.update(ones(params), tx.init(params), params)[0]


def sizes(node):
    """The size of the update of each field, which is the same in all its entries."""
    fields = [f for f in ("w", "a", "b", "value", "scale") if getattr(node, f, None) is not None]
    for field in fields:
        assert np.ptp(getattr(node, field)) == 0
    return {f: round(abs(float(getattr(node, f).ravel()[0])), 6) for f in fields}


@pytest.mark.parametrize("params", [JOINED, lora_jax.split(JOINED)[1]], ids=["joined", "split"])
def test_lora_fa_trains_b_alone(params):
    tx = lora_jax.lora_fa(optax.adam(1.0), params)
    nodes = [n for n in jax.tree.leaves(params, is_leaf=is_node) if is_node(n)]
    trained = sum(n.b.size if isinstance(n, lora_jax.LoraWeight) else n.value.size for n in nodes)
    assert count(tx.init(params)) == 2 * trained + 1
    updates = updates_of(tx, params)
    assert float(jnp.abs(updates["up"]["kernel"].a).max()) == 0
    assert float(jnp.abs(updates["up"]["kernel"].b).min()) > 0.9
    assert float(jnp.abs(updates["up"]["bias"].value).min()) > 0.9
    without = lora_jax.freeze(optax.adam(1.0), params, only=["b"])
    assert float(jnp.abs(updates_of(without, params)["up"]["bias"].value).max()) == 0


def test_lora_fa_of_a_weight_whose_a_starts_as_zero():
    """Nothing of a lookup would train; neither while tracing nor of shapes alone can one know."""
    params, ids = {"table": jnp.ones((5, 4)), "w": jnp.ones((4, 3))}, jnp.arange(3)
    fn = lambda params, ids: params["table"][ids] @ params["w"]
    config = lora_jax.LoraConfig(rank=2, targets=["table", "w"])
    adapted = lora_jax.init(jax.random.key(0), params, config, fn, ids)
    with pytest.raises(TargetError, match=r"lora_fa: A is zero .*: table\. "):
        lora_jax.lora_fa(optax.sgd(1.0), adapted)
    lora_jax.lora_fa(optax.sgd(1.0), {"w": adapted["w"]})
    shapes = jax.eval_shape(lambda x: x, adapted)
    lora_jax.lora_fa(optax.sgd(1.0), shapes)
    jax.eval_shape(lambda x: lora_jax.lora_fa(optax.sgd(1.0), x).init(x), adapted)


def step_of(freeze, depth, rank):
    """One step on a chain of linear layers [256, 256] and 512 tokens, as XLA compiles it."""
    shape = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    params = {f"kernel_{i}": shape for i in range(depth)}
    params = lora_jax.init(KEY, params, LoraConfig(rank=rank))

    def chain(params, x):
        for kernel in params.values():
            x = x + x @ kernel
        return (x**2).mean()

    base, adapters = lora_jax.split(params)
    tx = freeze(optax.sgd(1e-3), adapters)

    def step(adapters, base, x):
        loss = lambda a: lora_jax.lora(chain)(lora_jax.join(base, a), x)
        updates, _ = tx.update(jax.grad(loss)(adapters), tx.init(adapters), adapters)
        return optax.apply_updates(adapters, updates)

    x = jax.ShapeDtypeStruct((512, 256), jnp.float32)
    return jax.jit(step, donate_argnums=0).lower(adapters, base, x).compile()


@pytest.mark.usefixtures("optimized")
def test_lora_fa_computes_no_gradient_of_a():
    """dA = xᵀ·(dy·Bᵀ): two products, for x has no gradient of its own here."""
    plain, fa = (
        step_of(freeze, 1, 64).cost_analysis()["flops"]
        for freeze in (lora_jax.freeze, lora_jax.lora_fa)
    )
    assert plain - fa == pytest.approx(2 * 2 * 512 * 256 * 64, rel=0.02)


@pytest.mark.usefixtures("optimized")
def test_lora_fa_keeps_no_inputs():
    """Of six layers the inputs, 512 KiB each, are not kept for dA."""
    plain, fa = (
        temporary_bytes(step_of(freeze, 6, 2)) for freeze in (lora_jax.freeze, lora_jax.lora_fa)
    )
    assert plain - fa >= 4 * 512 * 256 * 4


@pytest.mark.parametrize("params", [JOINED, lora_jax.split(JOINED)[1]], ids=["joined", "split"])
def test_lora_plus(params):
    tx = lora_jax.lora_plus(0.5, params, ratio=8, optimizer=optax.sgd)
    updates = updates_of(tx, params)
    kernel, bias = updates["up"]["kernel"], updates["up"]["bias"]
    frozen = {"scale": 0} if kernel.w is None else {"w": 0, "scale": 0}
    assert sizes(kernel) == {"a": 0.5, "b": 4.0, **frozen}
    assert sizes(bias) == {"value": 0.5, **frozen}


def test_lora_plus_takes_a_schedule_and_any_optimizer():
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    tx = lora_jax.lora_plus(schedule, JOINED, 16, optimizer=optax.sgd)
    state = tx.init(JOINED)
    for want in (1.0, 0.75):
        updates, state = tx.update(ones(JOINED), state, JOINED)
        assert sizes(updates["up"]["kernel"]) == {"w": 0, "a": want, "b": 16 * want, "scale": 0}
    chain = optax.chain(optax.clip_by_global_norm(1.0), lora_jax.lora_plus(3e-2, JOINED, 4))
    params, state, losses = JOINED, chain.init(JOINED), []

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params, X, Y)
        updates, state = chain.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    for _ in range(30):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, lora_jax.split(params)[0], PARAMS)


def test_groups():
    rates = {"down": 2.0, r".*\.b": 3.0, "up/bias": 4.0}
    transforms = {key: optax.sgd(rate) for key, rate in rates.items()}
    updates = updates_of(lora_jax.groups(transforms, JOINED, default=optax.sgd(1.0)))
    assert sizes(updates["up"]["kernel"]) == {"w": 0, "a": 1, "b": 3, "scale": 0}
    assert sizes(updates["down"]["kernel"]) == {"w": 0, "a": 2, "b": 2, "scale": 0}
    assert sizes(updates["up"]["bias"]) == {"w": 0, "value": 4, "scale": 0}
    assert float(jnp.abs(updates["norm"]["scale"]).max()) == 0


def test_groups_by_their_own_names_and_clipped_each():
    """A name that `freeze` uses, an exact field, and clipping that counts one group alone."""
    params = {"train": PARAMS["up"]["kernel"], "freeze": PARAMS["down"]["kernel"]}
    params = lora_jax.init(KEY, params, LoraConfig(rank=2))
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    transforms = {"freeze": optax.sgd(2.0), "train": optax.sgd(3.0), "train.a": clipped}
    updates = updates_of(lora_jax.groups(transforms, params), params)
    assert sizes(updates["freeze"]) == {"w": 0, "a": 2, "b": 2, "scale": 0}
    want = round(1 / np.sqrt(14), 6)
    assert sizes(updates["train"]) == {"w": 0, "a": want, "b": 3, "scale": 0}


def test_groups_without_a_default_must_cover_everything():
    with pytest.raises(TargetError) as error:
        lora_jax.groups({"down": optax.sgd(1.0), "dwon.b": optax.sgd(1.0)}, JOINED)
    message = str(error.value)
    assert "'dwon.b' matches nothing" in message and "down/kernel" in message
    assert "up/kernel.a has no group" in message and "up/bias.value has no group" in message
    assert "down/kernel.a" not in message


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lora_jax.freeze(optax.sgd(1.0), JOINED, only=["w"]), ConfigError, "only"),
        (lambda: lora_jax.freeze(optax.sgd(1.0), JOINED, only="ab"), ConfigError, "only"),
        (lambda: lora_jax.freeze(optax.sgd(1.0), JOINED, only=[]), ConfigError, "only"),
        (lambda: lora_jax.lora_fa(optax.sgd(1.0), PARAMS), StructureError, "no adapters"),
        (lambda: lora_jax.lora_plus(1.0, PARAMS), StructureError, "no adapters"),
        (lambda: lora_jax.lora_plus(1.0, JOINED, ratio=0), ConfigError, "ratio"),
        (lambda: lora_jax.groups({"a": optax.sgd(1.0)}, PARAMS), StructureError, "no adapters"),
        (lambda: lora_jax.groups({"(": optax.sgd(1.0)}, JOINED), ConfigError, "groups: '\\('"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- one leaf, two uses ---------------------------------------------------------------------------


def test_a_tied_embedding_trains_merges_and_counts_as_one_leaf(quick_compile):
    table = normal(5, (11, 4), jnp.float32)
    ids = jnp.array([[1, 10, 1], [0, 3, 5]])
    tied = lambda params, ids: jnp.tanh(params["embedding"][ids]) @ params["embedding"].T
    config = LoraConfig(rank=2, alpha=3, targets=["embedding"])
    start = lora_jax.init(KEY, {"embedding": table}, config, tied, ids)
    assert lora_jax.count_params(start) == (2 * (11 + 4), 44 + 2 * (11 + 4))

    def trained(fn, params, tx):
        @jax.jit
        def step(params, state):
            grads = jax.grad(lambda p: jnp.square(fn(p, ids) - 1).mean())(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        for _ in range(5):
            params, state = step(params, state)
        return params

    ours = trained(lora_jax.lora(tied), start, lora_jax.freeze(optax.adam(1e-2), start))

    def oracle(factors, ids):
        return tied({"embedding": table + 1.5 * factors["a"] @ factors["b"]}, ids)

    node = start["embedding"]
    want = trained(oracle, {"a": node.a, "b": node.b}, optax.adam(1e-2))
    np.testing.assert_allclose(ours["embedding"].b, want["b"], rtol=1e-4, atol=1e-6)
    merged = lora_jax.merge(ours)
    np.testing.assert_allclose(
        tied(merged, ids), lora_jax.lora(tied)(ours, ids), rtol=1e-5, atol=1e-6
    )
