"""The linear probe on hand-made features."""

import numpy as np
import pytest

from examples.sentiment import probe


def separated(n=400, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Draw five features: one tells the label with noise, three do not, one is dead."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    x = rng.normal(size=(n, 5))
    x[:, 0] = 3 * (2 * labels - 1) + rng.normal(size=n)
    x[:, 4] = 1e-9 * rng.normal(size=n)
    return x, labels


def test_the_optimum_by_hand():
    # One feature of ±1: by symmetry the bias is 0, and sigmoid(-w) = l2 * w, which w = 1 solves.
    features, labels = np.array([[1.0], [-1.0]]), np.array([1, 0])
    fitted = probe.fit(features, labels, l2=1 / (1 + np.e))
    np.testing.assert_allclose([fitted.weights[0], fitted.bias], [1, 0], atol=5e-6)


def test_standardization_is_folded_in():
    x, labels = separated()
    plain, moved = probe.fit(x, labels, 0.1), probe.fit(x * [5, 1, 1, 2, 1] + 3, labels, 0.1)
    np.testing.assert_allclose(moved.weights[:4] * [5, 1, 1, 2], plain.weights[:4], rtol=1e-6)


def test_a_dead_feature_has_no_weight():
    x, labels = separated()
    fitted = probe.fit(x.astype(np.float32), labels, 0.01)
    assert fitted.weights[4] == 0
    assert fitted.accuracy(*separated(seed=1)) > 0.98


def test_the_strength_is_chosen_without_the_held_out_data():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    x = rng.normal(size=(300, 120))
    x[:, 0] += 0.7 * (2 * labels - 1)  # one honest feature among enough noise to fit anything
    strengths = (1e-3, 1.0)
    judged = [
        probe.fit(x[:240], labels[:240], l2).accuracy(x[240:], labels[240:]) for l2 in strengths
    ]
    assert judged[0] < judged[1]
    chosen = probe.fit_best(x, labels, strengths)
    refitted = probe.fit(x, labels, 1.0)
    assert chosen.l2 == 1.0
    np.testing.assert_array_equal(chosen.weights, refitted.weights)


def test_on_a_tie_the_stronger_wins():
    x, labels = separated()
    assert probe.fit_best(x * [10, 1, 1, 1, 1], labels, (1e-2, 1e-1)).l2 == 1e-1


def test_perfectly_separable_without_overflow():
    x, labels = separated()
    x[:, 0] = 1000.0 * (2 * labels - 1)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        assert probe.fit(x, labels, 1e-9).accuracy(x, labels) == 1


@pytest.mark.parametrize(
    ("labels", "l2", "message"),
    [([0, 1], 0.0, "l2 must be above zero"), ([1, 1], 0.1, "needs both labels")],
)
def test_refused(labels, l2, message):
    with pytest.raises(ValueError, match=message):
        probe.fit(np.array([[0.0], [1.0]]), np.array(labels), l2)
