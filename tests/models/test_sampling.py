"""What `top_k` and `top_p` leave of a large vocabulary, beside numpy in float64."""

import jax
import numpy as np

from lora_jax.models.sampling import likeliest

VOCABULARY = 2500  # more than are looked at before all are sorted
ALL = VOCABULARY
FEW = [(10, 1.0), (ALL, 0.5), (700, 0.88), (ALL, 1.0), (1, 0.3), (1000, 1.0)]
MANY = [(1500, 1.0), (ALL, 0.999), (2000, 0.95), (ALL - 1, 1.0), (1100, 0.2), (ALL, 1.0)]


def expected(logits, top_k, top_p):
    """Return the tokens that are left."""
    order = np.argsort(-logits, kind="stable")[:top_k]
    chances = np.exp(logits[order].astype(np.float64))
    before = np.concatenate([[0], chances.cumsum()[:-1]]) / chances.sum()
    return {*order[(before < top_p) | (top_p == 1)].tolist()}


def test_what_is_left_of_a_large_vocabulary():
    rng = np.random.default_rng(0)
    logits = (2 * rng.normal(size=(6, VOCABULARY))).astype(np.float32)
    logits[2] = logits[2].round(1)  # many are equal
    run = jax.jit(likeliest)
    for cases in (FEW, MANY, [*FEW[:3], *MANY[3:]]):
        top_k, top_p = (np.array(x) for x in zip(*cases, strict=True))
        found = np.asarray(run(logits, top_k.astype(np.int32), top_p.astype(np.float32)))
        for row, given, case in zip(found, logits, cases, strict=True):
            left = {*np.flatnonzero(np.isfinite(row)).tolist()}
            assert left == expected(given, *case), case
            np.testing.assert_array_equal(row[[*left]], given[[*left]])
    assert max(len(expected(x, *case)) for x, case in zip(logits, MANY, strict=True)) == ALL
