"""Named-axis arithmetic, against numpy's einsum."""

import math

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np

from lora_jax.engine import named_axes

SIZES = {"a": 2, "b": 3, "c": 4, "d": 5}


@st.composite
def operands(draw):
    names = st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True)
    x, y = draw(names), draw(names)
    keep = draw(st.sets(st.sampled_from(sorted({*x, *y}))))
    return x, y, keep


@hypothesis.given(operands())
@hypothesis.settings(max_examples=30)
def test_contract_is_einsum(drawn):
    x_names, y_names, keep = drawn
    rng = np.random.default_rng(0)
    x = rng.normal(size=[SIZES[n] for n in x_names]).astype(np.float32)
    y = rng.normal(size=[SIZES[n] for n in y_names]).astype(np.float32)
    got, names = named_axes.contract(jnp.asarray(x), x_names, jnp.asarray(y), y_names, keep)
    want = np.einsum(f"{''.join(x_names)},{''.join(y_names)}->{''.join(names)}", x, y)
    assert set(names) == keep
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_arrange_transposes_and_broadcasts():
    x = jnp.arange(6.0).reshape(2, 3)
    got = named_axes.arrange(x, ["a", "b"], ["b", "c", "a"], SIZES)
    np.testing.assert_array_equal(got, np.broadcast_to(np.asarray(x).T[:, None], (3, 4, 2)))


@hypothesis.given(
    st.lists(st.sampled_from([1, 2, 3, 4]), max_size=5),
    st.lists(st.sampled_from([1, 2, 3, 4]), max_size=5),
)
def test_reshape_groups_partition_both_shapes(factors, cuts):
    old = tuple(factors)
    total = math.prod(old)
    new = []
    for cut in cuts:
        if total % cut == 0:
            new.append(cut)
            total //= cut
    new = (*new, total)
    groups = named_axes.reshape_groups(old, new)
    for olds, news in groups:
        assert math.prod(old[i] for i in olds) == math.prod(new[j] for j in news) > 1
    flat = [i for olds, _ in groups for i in olds]
    assert flat == [i for i, size in enumerate(old) if size != 1]
    assert [j for _, news in groups for j in news] == [j for j, n in enumerate(new) if n != 1]
