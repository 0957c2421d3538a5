"""A batch whose rows use different adapters gives what each row gives with its own adapter."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora


class Net(nn.Module):
    """Dense layers, a norm and attention."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.gelu(nn.Dense(16)(x)))
        return nn.Dense(5)(x + nn.MultiHeadDotProductAttention(4)(x, x))


NET = Net()
ROWS = jax.random.normal(jax.random.key(0), (6, 7, 8))
BASE = NET.init(jax.random.key(1), ROWS)
IDS = [0, 1, 2, 3, -1, 1]


def new(rank, seed, **options):
    """Return an overlay with random factors."""
    config = lora.LoraConfig(rank=rank, alpha=2 * rank, **options)
    params = lora.init(jax.random.key(seed), BASE, config, NET.apply, ROWS)
    keys = iter(jax.random.split(jax.random.key(seed + 50), 100))

    def noisy(x):
        return x + 0.1 * jax.random.normal(next(keys), x.shape) if x.ndim > 1 else x

    return jax.tree.map(noisy, lora.split(params)[1])


@functools.cache
def adapters():
    """Return overlays of different ranks, targets and kinds."""
    return (
        new(2, 0),
        new(4, 1, dora=True),
        new(3, 2, targets=["Dense_0/kernel"]),
        new(5, 3, scaling="rslora", train=["bias"]),
    )


def one_by_one(rows, ids):
    """Return what each row gives alone, with its own adapter."""
    run = lora.lora(NET.apply)
    outs = []
    for row, i in zip(rows, ids, strict=True):
        outs.append(
            NET.apply(BASE, row[None]) if i < 0 else run(lora.join(BASE, adapters()[i]), row[None])
        )
    return jnp.concatenate(outs)


def _nodes(tree):
    return {
        jax.tree_util.keystr(path): node
        for path, node in jax.tree_util.tree_flatten_with_path(
            tree, is_leaf=lambda x: isinstance(x, lora.LoraWeight | lora.TrainedLeaf)
        )[0]
    }


def test_each_row_gets_its_own_adapter_and_other_ids_do_not_compile_again():
    traces = []

    @jax.jit
    def run(stack, x, ids):
        traces.append(ids)
        return lora.lora(NET.apply, adapters_of=ids)(lora.join(BASE, stack), x)

    stack = lora.stack(adapters())
    for ids in (IDS, IDS[::-1]):
        got = run(stack, ROWS, jnp.array(ids))
        np.testing.assert_allclose(got, one_by_one(ROWS, ids), rtol=0, atol=2e-6)
    swapped = lora.set_slot(stack, 1, adapters()[3])
    got = run(swapped, ROWS, jnp.array([1] * 6))
    np.testing.assert_allclose(got, one_by_one(ROWS, [3] * 6), rtol=0, atol=2e-6)
    assert len(traces) == 1


def test_gradients_are_those_of_each_row_alone():
    weights = jax.random.normal(jax.random.key(2), (6, 7, 5))

    def mixed(stack):
        out = lora.lora(NET.apply, adapters_of=jnp.array(IDS))(lora.join(BASE, stack), ROWS)
        return (out * weights).sum()

    def alone(overlay, slot):
        chosen = [n for n, i in enumerate(IDS) if i == slot]
        out = lora.lora(NET.apply)(lora.join(BASE, overlay), ROWS[np.array(chosen)])
        return (out * weights[np.array(chosen)]).sum()

    got = jax.grad(mixed)(lora.stack(adapters()))
    for slot, overlay in enumerate(adapters()):
        # Stacked with adapters of its kinds and ranks, so that both are padded alike.
        want = jax.grad(lambda one, n=slot: alone(one, n))(overlay)
        others = [want if n == slot else x for n, x in enumerate(adapters())]
        mine, single = (lora.select(x, slot) for x in (got, lora.stack(others)))
        for path, node in _nodes(single).items():
            for field in ("a", "b", "magnitude", "value"):
                x = getattr(node, field, None)
                if x is not None:
                    y = getattr(_nodes(mine)[path], field)
                    np.testing.assert_allclose(y, x, rtol=0, atol=1e-5, err_msg=f"{path} {field}")


@pytest.mark.parametrize(
    "fn",
    [
        lambda params, x: NET.apply(params, x).mean(),
        lambda params, x: NET.apply(params, x) - NET.apply(params, x).mean(0, keepdims=True),
        lambda params, x: jnp.sort(NET.apply(params, x), axis=0),
        lambda params, x: jnp.einsum("abc,dbc->ad", *[NET.apply(params, x)] * 2),
        lambda params, x: jax.lax.scan(lambda c, r: (c + r, c), 0.0 * x[0, 0], x[:, 0])[1],
    ],
    ids=["mean", "batch norm", "sort", "rows with rows", "scan"],
)
def test_a_function_that_mixes_rows_is_refused(fn):
    stack = lora.join(BASE, lora.stack(adapters()))
    with pytest.raises(lora.ConfigError, match="mixes the rows"):
        lora.lora(fn, adapters_of=jnp.array(IDS))(stack, ROWS)
