"""Every verb on a stack of adapters: what it does for each adapter alone, or one clear refusal."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from lora_jax.files.naming import Entry, Naming
from tests.programs import normal

BASE = {
    "up": normal(7, (4, 6), jnp.float32),
    "down": normal(8, (6, 4), jnp.float32),
    "bias": jnp.arange(4.0),
}
X = normal(9, (5, 4), jnp.float32)
NAMING = Naming(tuple(Entry(f"{n}.weight", n, "linear") for n in ("up", "down")))


def model(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"] + params["bias"][None]


def loss(params, x):
    return (lora.lora(model)(params, x) ** 2).sum()


def new(rank, **options):
    """Make an adapter whose factors are all non-zero, as after training."""

    @jax.jit
    def made(key):
        params = lora.init(key, BASE, lora.LoraConfig(rank=rank, **options))
        labels = lora.labels(params)
        noise = lambda x, label: (
            x + (0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape)) * (label == "train")
        )
        return lora.split(jax.tree.map(noise, params, labels))[1]

    return made(jax.random.key(rank))


ADAPTERS = [new(1, targets=["up"]), new(3, dora=True), new(2, alpha=5, train=["bias"])]
STACK = jax.jit(lambda adapters: lora.stack(adapters, rank=4))(ADAPTERS)
JOINED = lora.join(BASE, STACK)
EACH = [lora.join(BASE, x) for x in ADAPTERS]
RUN = jax.jit(lora.lora(model))


def equal(got, want, atol=1e-6):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol)


def outputs(params):
    """Return the outputs of the adapters of a joined stack, one after another."""
    return [RUN(lora.select(params, i), X) for i in range(3)]


def plain():
    return model(BASE, X)


def set_scale(stack):
    scales = jnp.array([0.5, 0.0, 2.0])
    want = [RUN(lora.set_scale(p, s), X) for p, s in zip(EACH, scales, strict=True)]
    equal(outputs(lora.set_scale(stack, scales)), want)
    # where an adapter has no such target, a scale switches nothing on
    equal(outputs(lora.set_scale(stack, 1)), [RUN(lora.set_scale(p, 1), X) for p in EACH])
    off = lora.set_scale(lora.select(stack, -1), 1.0)
    equal(RUN(off, X), plain())


def disable(stack):
    equal(outputs(lora.disable(stack)), [plain()] * 3)


def norms(stack):
    got = jax.jit(lora.norms)(stack, stack)
    for slot, params in enumerate(EACH):
        merged = lora.merge(params)
        for path, node in lora.split(params)[1].items():
            if node is None:
                assert float(got[path]["update"][slot]) == 0
                continue
            change = np.linalg.norm(merged[path] - BASE[path])
            equal(got[path]["update"][slot], change, atol=1e-5)
            equal(got[path]["relative"][slot], change / np.linalg.norm(BASE[path]), atol=1e-5)
            for field in ("a", "b", "magnitude", "value"):
                if getattr(node, field, None) is not None:
                    size = np.linalg.norm(getattr(node, field))
                    equal([got[path][field][slot], got[path][f"grad_{field}"][slot]], [size] * 2)


def count_params(stack):
    shapes = 3 * (2 * 4 * (4 + 6) + 6 + 4 + 4)  # with the padding to rank 4
    assert lora.count_params(stack) == (shapes, 48 + 4 + shapes)


def summary(stack):
    shown = lora.summary(stack).splitlines()
    assert shown[1].split() == ["bias", "[4]", "-", "fully", "trained", "-", "12"]
    assert shown[2].split() == ["down", "[6,", "4]", "io", "-", "0-3", "132"]
    assert shown[3].split() == ["up", "[4,", "6]", "io", "-", "1-3", "138"]
    assert shown[4] == "a stack of 3 adapters, each padded to the largest rank"


def lora_fa(stack):
    tx = lora.lora_fa(optax.sgd(1.0), stack)
    ones = jax.tree.map(jnp.ones_like, stack)
    updates, _ = tx.update(ones, tx.init(stack), stack)
    assert not np.any(updates["up"].a) and np.all(updates["up"].b == -1)
    zero = jax.tree.map(lambda x: x, stack) | {}
    a = stack["up"].a.at[1].set(0)
    zero["up"] = type(stack["up"])(**{**vars(stack["up"]), "a": a})
    with pytest.raises(lora.TargetError, match=r"lora_fa: A is zero and would stay zero.*: up"):
        lora.lora_fa(optax.sgd(1.0), zero)


def groups(stack):
    tx = lora.groups({"up": optax.sgd(2.0)}, stack, default=optax.sgd(1.0))
    ones = jax.tree.map(jnp.ones_like, stack)
    updates, _ = tx.update(ones, tx.init(stack), stack)
    assert np.all(updates["up"].a == -2) and np.all(updates["down"].a == -1)
    assert not np.any(updates["up"].slot) and not np.any(updates["up"].scale)


def quantize(stack):
    base = BASE | {"up": jnp.ones((64, 6))}
    overlay = lora.split(lora.init(jax.random.key(0), base, lora.LoraConfig(rank=1)))[1]
    joined = lora.quantize(lora.join(base, lora.stack([overlay] * 2)), "int8", targets=["up"])
    assert isinstance(joined["up"].w, lora.QuantizedWeight) and joined["up"].slots == 2
    np.testing.assert_array_equal(lora.dequantize(joined)["up"].w, base["up"])


def labels(stack):
    found = lora.labels(stack)["up"]
    assert (found.a, found.magnitude, found.slot, found.w) == ("train", "train", "freeze", "freeze")
    assert not lora.mask(stack)["bias"].slot


def shardings(stack):
    assert jax.tree.structure(lora.shardings(stack)) == jax.tree.structure(stack)
    specs = lora.partition_specs(stack, slots="replica")["up"]
    assert specs.a == jax.sharding.PartitionSpec("replica")


def merge_one(stack):
    equal([lora.merge(x) for x in lora.unstack(stack)], [lora.merge(x) for x in EACH])
    picked = lora.select(stack, 2)  # with padding, and with the place of a magnitude
    equal(lora.merge(picked), lora.merge(EACH[2]))
    back = lora.unmerge(lora.merge(picked), lora.split(picked)[1])
    equal(back["up"].w, BASE["up"])


def extract(stack):
    overlay, missed = lora.extract(BASE, lora.merge(lora.select(stack, 0)), 1)
    assert missed["up"] < 1e-5
    grown = lora.set_slot(stack, 1, overlay)
    equal(outputs(grown)[1], outputs(stack)[0], atol=1e-4)


def on_original_of_one(stack):
    """An adapter of a stack, padded, put on the base from before PiSSA changed it."""
    start = lora.init(jax.random.key(0), BASE, lora.LoraConfig(rank=2, init="pissa"))
    residual, first = lora.split(start)
    trained = jax.tree.map(lambda x: x * 1.5, first)
    both = lora.stack([trained, trained], rank=4)
    picked = lora.select(both, 1)
    want = lora.merge(lora.join(residual, trained))
    equal(lora.merge(lora.join(BASE, lora.on_original(start, picked, BASE))), want, atol=1e-5)


VERBS = [
    set_scale,
    disable,
    norms,
    count_params,
    summary,
    lora_fa,
    groups,
    quantize,
    labels,
    shardings,
    merge_one,
    pytest.param(extract, marks=pytest.mark.slow),
    pytest.param(on_original_of_one, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
def test_verb_does_for_each_adapter_what_it_does_for_one(verb):
    verb(JOINED)


REFUSALS = {
    "merge": (
        lambda: lora.merge(JOINED),
        r"bias: a stack of 3 adapters; take one, unstack\(stack\)\[slot\] or",
    ),
    "unmerge": (lambda: lora.unmerge(BASE, STACK), r"bias: a stack of 3 adapters; take one"),
    "lora": (lambda: lora.lora(model)(JOINED, X), r"bias: a stack of 3 adapters; take one"),
    "on_original": (
        lambda: lora.on_original(EACH[2], STACK, BASE),
        r"bias: a stack of 3 adapters; take one",
    ),
    "set_scale": (
        lambda: lora.set_scale(STACK, jnp.ones(2)),
        r"set_scale: bias is a stack of 3 adapters; pass a number, or one per slot, \[3\], not",
    ),
    "init": (
        lambda: lora.init(jax.random.key(0), JOINED, lora.LoraConfig(rank=1)),
        r"already adapted: bias, down, up\. Call merge\(params\) first",
    ),
    "stack of stacks": (lambda: lora.stack([STACK]), r"up: adapter 0 is a stack itself; unstack"),
    "stack of joined": (lambda: lora.stack(EACH), r"up: adapter 0 contains its base; split it"),
    "unstack of one": (lambda: lora.unstack(ADAPTERS[0]), r"unstack: this is not a stack of adap"),
    "unstack of shapes": (
        lambda: lora.unstack(jax.eval_shape(lambda: STACK)),
        r"unstack: bias has no values here, and so its ranks are not known; use select",
    ),
    "too large a rank": (
        lambda: lora.set_slot(STACK, 0, lora.stack([ADAPTERS[0]], rank=5)),
        r"up: pass a single overlay",
    ),
    "set_slot in a narrower stack": (
        lambda: lora.set_slot(
            jax.tree.map(lambda x: x.astype(jnp.bfloat16), STACK), 0, ADAPTERS[2]
        ),
        r"up: a is float32, which a stack of bfloat16 would round; convert it before",
    ),
    "set_slot with a larger rank": (
        lambda: lora.set_slot(lora.stack(ADAPTERS[:1]), 0, new(2, targets=["up"])),
        r"up: rank 2 does not fit a stack of rank 1; make the stack with rank=2 or more",
    ),
    "a rank that is too small": (
        lambda: lora.stack(ADAPTERS, rank=2),
        r"stack: rank=2 is less than the largest adapter's, 3",
    ),
    "a slot that is not there": (lambda: lora.select(STACK, 3), r"select: no slots \[3\]; the sta"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal_names_the_path_and_the_mend(name):
    call, message = REFUSALS[name]
    with pytest.raises(lora.LoraError, match=message):
        call()
