"""What `all-linear` leaves out: named with its reason, warned of where it is a surprise."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import LeftOutWarning, LoraConfig, TargetError
from lora_jax.core.tree import adapted_nodes
from tests.programs import normal

KEY = jax.random.key(0)
X = normal(0, (3, 6), "float32")
MASK = jnp.arange(30).reshape(6, 5) % 3 > 0


def masked(w, x):
    return x @ jnp.where(MASK, w, 0)


def standardized(w, x):
    return x @ ((w - w.mean(0, keepdims=True)) / w.std(0, keepdims=True))


def quantized(w, x):
    """Rounded, with a gradient that goes straight through."""
    return x @ (w + jax.lax.stop_gradient(jnp.round(w) - w))


def called_back(w, x):
    out = jax.ShapeDtypeStruct((3, 5), jnp.float32)
    return jax.pure_callback(lambda w, x: np.asarray(x) @ np.asarray(w), out, w, x)


def added(w, x):
    return x[:, :5] + w[:3]


#: A use that is no linear layer's, and what the reason says.
SURPRISES = {
    masked: r"changed by `select_n` at .*py:\d+.* before `dot_general` at .*py:\d+.* contracts it",
    standardized: r"changed by `reduce_sum`|changed by `sub`|changed by `div`",
    quantized: r"changed by `round` at",
    called_back: r"`pure_callback` at .*py:\d+.* does not show how it is used",
}
ADDED = r"used by `add` at .*py:\d+.*, and contracted with no activation"


def beside_a_layer(use):
    fn = lambda params, x: use(params["odd/w"], x) + x @ params["plain"]
    return fn, {"odd/w": normal(1, (6, 5), "float32"), "plain": normal(2, (6, 5), "float32")}


@pytest.mark.parametrize(
    ("use", "reason"), SURPRISES.items(), ids=lambda x: getattr(x, "__name__", "")
)
def test_a_matrix_that_is_used_otherwise(use, reason):
    fn, params = beside_a_layer(use)
    with pytest.warns(LeftOutWarning) as caught:
        adapted = lora_jax.init(KEY, params, LoraConfig(2), fn, X)
    assert {*adapted_nodes(adapted)} == {"plain"}
    (warning,) = caught
    message = str(warning.message)
    assert "\n" not in message and message.startswith("targets: all-linear leaves out a matrix")
    assert re.search(rf"odd/w: ({reason})", message)
    assert warning.filename == __file__
    shown = lora_jax.summary(adapted, fn, X).splitlines()
    assert re.search(rf"^odd/w +\[6, 5\] +({reason})", shown[-1])
    assert lora_jax.summary(adapted).splitlines() == shown[:-3]


@pytest.mark.parametrize(
    ("use", "reason"), SURPRISES.items(), ids=lambda x: getattr(x, "__name__", "")
)
def test_alone_the_error_gives_the_same_reason(use, reason):
    fn = lambda params, x: use(params["odd/w"], x)
    params = {"odd/w": normal(1, (6, 5), "float32")}
    with pytest.raises(TargetError, match=rf"all-linear finds no weight.*\nodd/w: ({reason})"):
        lora_jax.init(KEY, params, LoraConfig(2), fn, X)


@pytest.mark.parametrize("field", ["exclude", "train", "targets"])
def test_what_the_configuration_names_is_no_surprise(field):
    fn, params = beside_a_layer(masked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora_jax.init(KEY, params, LoraConfig(2, **{field: ["odd/w"]}), fn, X)


def test_what_is_only_added_is_listed_without_a_warning():
    """A bias of several axes, or a table of positions."""
    fn, params = beside_a_layer(added)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted = lora_jax.init(KEY, params, LoraConfig(2), fn, X)
    assert re.search(rf"odd/w +\[6, 5\] +{ADDED}", lora_jax.summary(adapted, fn, X))
    del params["plain"]
    with pytest.raises(TargetError, match=rf"odd/w: {ADDED}"):
        lora_jax.init(KEY, params, LoraConfig(2), lambda p, x: added(p["odd/w"], x), X)


@pytest.mark.parametrize("use", [masked, standardized, quantized])
def test_a_stack_of_matrices_in_a_scan(use):
    stack = {"odd/w": normal(1, (2, 6, 5), "float32"), "plain": normal(2, (2, 6, 5), "float32")}

    def fn(params, x):
        step = lambda c, p: (c, use(p["odd/w"], x) + x @ p["plain"])
        return jax.lax.scan(step, 0, params)[1]

    with pytest.warns(LeftOutWarning, match=r"odd/w: changed by .* contracts it"):
        adapted = lora_jax.init(KEY, stack, LoraConfig(2), fn, X)
    assert {*adapted_nodes(adapted)} == {"plain"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named = lora_jax.init(KEY, stack, LoraConfig(2, targets=["odd/w", "plain"]), fn, X)
    assert named["odd/w"].layout.axes == named["plain"].layout.axes == "bio"


def test_embeddings_and_unused_leaves_are_listed_without_a_warning():
    params = {
        "embedding": normal(1, (9, 6), "float32"),
        "head": normal(2, (6, 5), "float32"),
        "ids": jnp.zeros((2, 2), "int8"),
        "of another task": normal(3, (6, 5), "float32"),
        "out": normal(4, (5, 6), "float32"),
        "scale": jnp.ones(6),
    }
    fn = lambda p, ids: (p["embedding"][ids] * p["scale"][None] @ p["head"] @ p["out"], p["ids"])
    ids = jnp.arange(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted = lora_jax.init(KEY, params, LoraConfig(2, exclude=["out"]), fn, ids)
    assert {*adapted_nodes(adapted)} == {"head"}
    *_, table, integers, unused, excluded = lora_jax.summary(adapted, fn, ids).splitlines()
    assert re.fullmatch(r"embedding +\[9, 6\] +looked up by `gather` at .*, as an embed.*", table)
    assert re.fullmatch(r"ids +\[2, 2\] +int8 numbers cannot be trained", integers)
    assert re.fullmatch(r"of another task +\[6, 5\] +the function does not use it", unused)
    assert re.fullmatch(r"out +\[5, 6\] +the configuration leaves it out", excluded)


def test_many_are_one_line():
    params = {f"odd/{i}": normal(i, (6, 5), "float32") for i in range(9)} | {"w": jnp.ones((6, 5))}
    fn = lambda p, x: x @ p["w"] + sum(masked(w, x) for name, w in p.items() if name != "w")
    with pytest.warns(LeftOutWarning, match=r"leaves out 9 matrices .*; and 6 more\)"):
        lora_jax.init(KEY, params, LoraConfig(2), fn, X)


def test_without_the_function_the_error_asks_for_it():
    with pytest.raises(TargetError, match="Pass the function"):
        lora_jax.init(KEY, {"bias": jnp.ones(3)}, LoraConfig(2))
