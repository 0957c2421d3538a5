"""Rotations against the frequencies of `transformers` 5.24; see record_rope.py."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models.rope import Rope, rotate
from tests.models.recorded import FIXTURES

RECORDED = json.loads((FIXTURES / "rope.json").read_text())


@pytest.mark.parametrize("number", range(len(RECORDED)))
def test_frequencies_are_those_of_transformers(number):
    case = RECORDED[number]
    rope = Rope.from_json(case["settings"])
    is_long = case["length"] > rope.original_max_position_embeddings
    np.testing.assert_allclose(
        rope.frequencies(16, long=is_long), case["frequencies"], rtol=2e-6, atol=1e-9
    )
    assert rope.attention_factor == pytest.approx(case["factor"])


def test_a_call_beyond_the_original_length_has_other_angles():
    """A length that is known only when the program runs gives what a known one gives."""
    rope = Rope.from_json(RECORDED[8]["settings"])
    positions = jnp.arange(3)[None]
    short, long = (rope.angles(positions, 16, reach)[0] for reach in (64, 65))
    assert np.abs(short - long).max() > 0.1
    for reach, cos in ((64, short), (65, long)):
        np.testing.assert_allclose(rope.angles(positions, 16, jnp.asarray(reach))[0], cos)


def test_only_a_part_of_a_head_is_rotated():
    rope = Rope(partial=0.5)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 2, 8)), jnp.float32)
    y = rotate(x, *rope.angles(jnp.arange(5)[None], 8))
    np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
    whole = rotate(x[..., :4], *Rope().angles(jnp.arange(5)[None], 4))
    np.testing.assert_array_equal(y[..., :4], whole)
    assert np.abs(y - x)[:, 1:, :, :4].max() > 0.1
