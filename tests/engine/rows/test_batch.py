"""A batch whose rows use different adapters gives what each row gives with its own adapter."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora


class Net(nn.Module):
    """A table, dense layers and a norm."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8)(tokens)
        x = nn.LayerNorm()(nn.gelu(nn.Dense(16)(x)))
        return nn.Dense(5)(x)


NET = Net()
TOKENS = jax.random.randint(jax.random.key(0), (6, 7), 0, 11)
BASE = jax.jit(NET.init)(jax.random.key(1), TOKENS)
IDS = [0, 1, 2, 3, -1, 1]


def new(rank, seed, **options):
    """Return an overlay with random factors."""
    config = lora.LoraConfig(rank=rank, alpha=2 * rank, **options)
    params = lora.init(jax.random.key(seed), BASE, config, NET.apply, TOKENS)
    draw = np.random.default_rng(seed).normal
    noisy = lambda x: x + draw(size=x.shape).astype(x.dtype) / 10 if x.ndim > 1 else x
    return jax.tree.map(noisy, lora.split(params)[1])


@functools.cache
def adapters():
    """Return overlays of different ranks, targets and kinds."""
    return (
        new(2, 0),
        new(4, 1, dora=True),
        new(3, 2, targets=["Dense_0/kernel"]),
        new(5, 3, scaling="rslora", train=["bias"], rows={"embedding": [2, 5]}),
    )


@jax.jit
def mixed(overlays, tokens, ids):
    stack = lora.stack(overlays) if isinstance(overlays, tuple) else overlays
    return lora.lora(NET.apply, adapters_of=ids)(lora.join(BASE, stack), tokens)


@jax.jit
def by_every_adapter(overlays, tokens):
    """Return what the batch gives with each adapter, and with none: merged, not by the engine."""
    params = [lora.merge(lora.join(BASE, x)) for x in overlays]
    return jnp.stack([NET.apply(x, tokens) for x in (*params, BASE)])


def each_alone(overlays, ids):
    return by_every_adapter(overlays, TOKENS)[jnp.array(ids), jnp.arange(len(ids))]


def test_each_row_gets_its_own_adapter_and_other_ids_do_not_compile_again(quick_compile):
    stack, overlays = lora.stack(adapters()), adapters()
    for ids in (IDS, IDS[::-1]):
        want = each_alone(overlays, ids)
        np.testing.assert_allclose(mixed(stack, TOKENS, jnp.array(ids)), want, rtol=0, atol=4e-6)
    assert mixed._cache_size() == 1
    swapped = lora.set_slot(stack, 1, overlays[3])
    got = mixed(swapped, TOKENS, jnp.array([1] * 6))
    np.testing.assert_allclose(got, each_alone(overlays, [3] * 6), rtol=0, atol=4e-6)
    assert mixed._cache_size() == 1


@pytest.mark.slow  # those of programs are compared by default
def test_gradients_are_those_of_each_row_alone(quick_compile):
    weights = jax.random.normal(jax.random.key(2), (6, 7, 5))
    of_mixed = lambda x: (mixed(x, TOKENS, jnp.array(IDS)) * weights).sum()
    of_each = lambda x: (each_alone(x, IDS) * weights).sum()
    got, want = jax.jit(lambda x: (jax.grad(of_mixed)(x), jax.grad(of_each)(x)))(adapters())
    for path, x in jax.tree_util.tree_leaves_with_path(got):
        y = functools.reduce(lambda node, key: _child(node, key), path, want)
        name = jax.tree_util.keystr(path)
        if name.endswith(("scale", "slot")):
            assert not np.any(x)  # frozen
        else:
            np.testing.assert_allclose(x, y, rtol=0, atol=2e-5, err_msg=name)
            assert np.any(x), name


def _child(node, key):
    if isinstance(key, jax.tree_util.GetAttrKey):
        return getattr(node, key.name)
    return node[getattr(key, "key", getattr(key, "idx", None))]


def test_rows_of_one_adapter_drop_different_inputs():
    """Every row drops at its adapter's rate, and no two rows drop the same."""
    base = {"w": jnp.zeros((400, 1))}
    ones = jnp.ones((6, 400))

    def model(params, x):
        return (x[:, :, None] * jnp.eye(400)[None]) @ params["w"]  # [rows, 400, 1]

    def overlay(rate):
        config = lora.LoraConfig(rank=1, alpha=1, dropout=rate)
        params = lora.init(jax.random.key(0), base, config, model, ones)
        return lora.split(jax.tree.map(jnp.ones_like, params))[1]

    stack = lora.stack([overlay(rate) for rate in (0.25, 0.75)])
    params = lora.with_dropout(lora.join(base, stack), jax.random.key(3))
    run = jax.jit(lambda p, ids: lora.lora(model, adapters_of=ids)(p, ones)[..., 0])
    y = run(params, jnp.array([0, 0, 1, 1, -1, 0]))
    kept = [0.75, 0.75, 0.25, 0.25, 0, 0.75]
    for row, share in zip(np.asarray(y), kept, strict=True):
        assert abs((row != 0).mean() - share) < 0.12
        if share:
            np.testing.assert_allclose(row[row != 0], 1 / share, rtol=2e-7)
    masks = {(row != 0).tobytes() for row in np.asarray(y)}
    assert len(masks) == 6
