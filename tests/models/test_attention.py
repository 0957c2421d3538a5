"""Attention against the dense definition in float64, and its memory at two lengths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import attention
from lora_jax.models.attention import Sight, attend

BATCH, HEADS, GROUPS, SIZE = 2, 4, 2, 8
#: Lengths below the first group, in groups, and in blocks of which the last one is not whole.
LENGTHS = (5, 130, 521)


def dense(query, key, value, sight, causal, window):
    """Compute the definition, query by query over all keys, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    key, value = (np.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    first = 0 if sight.first is None else int(sight.first)
    back = np.arange(query.shape[1])[:, None] + first - np.arange(key.shape[1])[None]
    sees = np.ones((BATCH, *back.shape), bool)
    if causal:
        sees &= back >= 0
    if window is not None:
        sees &= back < window
    if sight.segments is not None:
        own, every = np.asarray(sight.segments), np.asarray(sight.key_segments)
        sees &= own[:, :, None] == every[:, None, :]
    scores = np.einsum("bqnd,bknd->bnqk", query, key) / np.sqrt(query.shape[-1])
    scores = np.where(sees[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bnqk,bknd->bqnd", weights, value)


def inputs(length, keys=None, dtype="float32"):
    rng = np.random.default_rng(length)
    shapes = ((length, HEADS), (keys or length, GROUPS), (keys or length, GROUPS))
    return [jnp.asarray(rng.normal(size=(BATCH, *s, SIZE)), dtype) for s in shapes]


def packed(length):
    """Return three texts of unequal lengths, of which the last is padding."""
    cuts = np.array([[length // 3, length - 2], [length // 2, length - 1]])
    return jnp.asarray(1 + (np.arange(length)[None, :, None] >= cuts[:, None]).sum(-1), jnp.int32)


def sights(length):
    segments = packed(length)
    return {
        "causal": (Sight(), True, None),
        "window": (Sight(segments, segments), True, 7),
        "packed": (Sight(segments, segments), True, None),
        "encoder": (Sight(segments, segments), False, None),
    }


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", ["causal", "window", "packed", "encoder"])
def test_equals_the_definition(length, case, x64):
    sight, causal, window = sights(length)[case]
    run = functools.partial(attend, causal=causal, window=window)
    # In float64 the core is another one: once is enough.
    dtypes = [("float32", 2e-6), ("float64", 1e-14)][: 2 if case == "window" else 1]
    for dtype, tolerance in dtypes:
        given = inputs(length, dtype=dtype)
        found = jax.jit(run)(*given, sight)
        assert found.dtype == dtype
        wanted = dense(*given, sight, causal, window)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("queries", "window"), [(1, None), (521, 5)])
def test_with_a_cache(queries, window):
    """Keys beyond those written belong to no text, and queries are anywhere among the keys."""
    keys, first = 600, 40
    written = jnp.arange(keys)[None] < first + queries
    every = jnp.where(written, jnp.array([[1], [2]]), 0)
    sight = Sight(every[:, first : first + queries], every, jnp.int32(first))
    given = inputs(queries, keys)
    run = functools.partial(attend, causal=True, window=window)
    wanted = dense(*given, sight, True, window)
    np.testing.assert_allclose(jax.jit(run)(*given, sight), wanted, rtol=0, atol=2e-6)


def test_gradients_are_those_of_whole_scores(x64, monkeypatch):
    """In float64, where blocks that are recomputed round as the whole does."""
    segments = packed(521)
    given = inputs(521, dtype="float64")

    def gradients(window):
        of = lambda *x: jnp.sin(
            attend(*x, Sight(segments, segments), causal=True, window=window)
        ).sum()
        return jax.jit(jax.grad(of, (0, 1, 2)))(*given)

    found = gradients(100)
    monkeypatch.setattr(attention, "KEPT_WHOLE", 521)
    monkeypatch.setattr(attention, "_GROUPS", 1)
    for a, b in zip(found, gradients(100), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", [pytest.param("packed", marks=pytest.mark.slow), "encoder"])
def test_memory_is_linear_in_the_length(case, optimized):
    """Forward and backward: twice the length takes twice the memory, where scores take four."""

    def temporaries(length, with_gradient):
        sight, causal, window = sights(length)[case]
        run = lambda *x: attend(*x, sight, causal=causal, window=window)
        grad = jax.grad(lambda *x: run(*x).sum(), (0, 1, 2))
        compiled = jax.jit(grad if with_gradient else run).lower(*inputs(length)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for with_gradient in (False, True):
        short, long = (temporaries(n, with_gradient) for n in (2048, 4096))
        assert long < 2.2 * short
        assert long < BATCH * HEADS * 4096**2 * 4 / 3  # of one square of scores


@pytest.mark.parametrize(
    ("dtype", "size", "capability", "taken"),
    [
        ("bfloat16", 64, (8, 0), True),
        ("float16", 256, (9, 0), True),
        ("bfloat16", 256, (8, 9), False),
        ("bfloat16", 60, (9, 0), False),
        ("bfloat16", 128, (7, 5), False),
        ("float32", 64, (9, 0), False),
        ("bfloat16", 64, None, False),
    ],
)
def test_what_cudnn_takes(dtype, size, capability, taken):
    assert attention.flash_takes(jnp.dtype(dtype), size, capability) == taken


def calls(monkeypatch, *args, **options):
    """Return the keywords of the calls of JAX's attention on a GPU; on the CPU XLA computes."""
    found, real = [], jax.nn.dot_product_attention

    def noted(*x, implementation, **keywords):
        found.append({**keywords, "implementation": implementation, "queries": x[0].shape[1]})
        return real(*x, implementation="xla", **keywords)

    monkeypatch.setattr(attention, "_capability", lambda: (9, 0))
    monkeypatch.setattr(jax.nn, "dot_product_attention", noted)
    return jax.jit(functools.partial(attend, **options))(*args), found


@pytest.mark.parametrize("window", [None, 7])
def test_cudnn_gets_its_own_mask_where_a_row_is_one_text(monkeypatch, window):
    given = inputs(130, dtype="bfloat16")
    found, (call,) = calls(monkeypatch, *given, causal=True, window=window)
    assert call["implementation"] == "cudnn" and call["is_causal"] and "mask" not in call
    wanted = dense(*given, Sight(), True, window)
    np.testing.assert_allclose(found.astype(np.float32), wanted, rtol=0, atol=0.02)


def test_cudnn_gets_a_mask_of_packed_texts_block_by_block(monkeypatch):
    monkeypatch.setattr(attention, "_FLASH_BLOCK", 256)
    segments = packed(578)
    given = inputs(578, dtype="bfloat16")
    sight = Sight(segments, segments)
    found, made = calls(monkeypatch, *given, sight, causal=True)
    assert {call["implementation"] for call in made} == {"cudnn"}
    assert max(call["mask"].shape[2] for call in made) <= 256
    wanted = dense(*given, sight, True, None)
    np.testing.assert_allclose(found.astype(np.float32), wanted, rtol=0, atol=0.02)


@pytest.mark.parametrize("length", [4, 301])
def test_cudnn_is_not_asked_for_few_queries_or_odd_lengths(monkeypatch, length):
    segments = packed(length)
    given = inputs(length, dtype="bfloat16")
    _, made = calls(monkeypatch, *given, Sight(segments, segments), causal=True)
    assert {call["implementation"] for call in made} == {"xla"}
