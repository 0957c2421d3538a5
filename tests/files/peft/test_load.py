"""Files that do not fit the base, and the messages about them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import AdapterFileError, peft
from lora_jax.core.tree import adapted_nodes
from lora_jax.files.disk import safetensors_file
from tests.files.peft.random_adapters import BASE, PREFIX, SHAPES, UP, equal
from tests.parity.peft import models
from tests.parity.peft.models import PLAIN, STACKED


def break_everything(tensors):
    layers = f"{PREFIX}model.layers"
    del tensors[f"{layers}.0.up.lora_B.weight"]
    del tensors[f"{layers}.1.up.lora_magnitude_vector"]
    tensors[f"{layers}.1.down.lora_A.weight"] = np.ones((3, 9), "f4")
    tensors[f"{layers}.2.down.lora_B.weight"] = np.ones((6, 4), "f4")
    tensors[f"{PREFIX}model.conv2.lora_A.weight"] = np.ones((3, 2, 6), "f4")
    tensors[f"{PREFIX}model.emb.lora_embedding_A"] = np.ones((3, 17), "i4")
    tensors[f"{layers}.0.norm.lora_A.weight"] = np.ones((3, 6), "f4")
    tensors[f"{layers}.7.up.lora_A.weight"] = np.ones((3, 6), "f4")
    tensors[f"{layers}.0.up.lora_B.bias"] = np.ones(10, "f4")
    tensors[f"{PREFIX}model.pooler.weight"] = np.ones((4, 4), "f4")
    tensors[f"{PREFIX}head.bias"] = np.ones(5, "f4")
    tensors["model.layers.0.up.lora_A.default.weight"] = np.ones((3, 6), "f4")


BROKEN = """
base_model.model.head.bias: has shape (5,), needs (4,)
base_model.model.model.conv2.lora_A.weight: has shape (3, 2, 6), needs (3, 2, 3, 2) at rank 3
base_model.model.model.emb.lora_embedding_A: is int32, but only floating-point tensors can be
base_model.model.model.emb.lora_embedding_A: missing, (3, 17)
base_model.model.model.layers.0.norm.lora_A.weight: model.layers.0.norm.weight is not in
base_model.model.model.layers.0.up.lora_B.bias: unexpected for a module of kind linear
base_model.model.model.layers.0.up.lora_B.weight: missing, (10, 3)
base_model.model.model.layers.1.down.lora_A.weight: has shape (3, 9), needs (3, 10) at rank 3
base_model.model.model.layers.1.up.lora_magnitude_vector: missing, (10,)
base_model.model.model.layers.2.down.lora_B.weight: has shape (6, 4), needs (6, 3) at rank 3
base_model.model.model.layers.7.up.lora_A.weight: not in this base; nearest paths: model.layers.
base_model.model.model.pooler.weight: not in this base; nearest paths: model.
model.layers.0.up.lora_A.default.weight: unexpected: PEFT's names start with base_model.model.
"""


def test_everything_wrong_is_told_at_once(edited):
    folder = edited("dora", break_everything)
    with pytest.raises(AdapterFileError) as caught:
        peft.load(folder, BASE, PLAIN)
    head, *lines = str(caught.value).splitlines()
    assert head == f"{folder / peft.TENSORS} does not fit the base:"
    for line, start in zip(lines, BROKEN.strip().splitlines(), strict=True):
        assert line.startswith(start)


def test_not_strict_takes_what_fits_and_tells_the_rest(edited):
    folder = edited("dora", break_everything)
    with pytest.warns(UserWarning) as caught:
        adapters = peft.load(folder, BASE, PLAIN, strict=False)
    (warning,) = caught
    assert warning.filename == __file__
    assert len(str(warning.message).splitlines()) == 1 + len(BROKEN.strip().splitlines())
    assert adapted_nodes(adapters).keys() == {
        *("model/conv1/kernel", "model/layers/0/down/kernel", "model/layers/2/up/kernel"),
    }
    whole = adapted_nodes(peft.load(models.unpack("dora", folder), BASE, PLAIN))
    for path, node in adapted_nodes(adapters).items():
        equal(node, whole[path])


def test_modules_that_are_targeted_and_missing(edited):
    def drop(tensors):
        for name in [name for name in tensors if "layers.1." in name]:
            del tensors[name]

    with pytest.raises(AdapterFileError) as caught:
        peft.load(edited("linear", drop), BASE, PLAIN)
    assert len(str(caught.value).splitlines()) == 3
    assert "layers.1.up.lora_A.weight: missing, but target_modules" in str(caught.value)
    nodes = adapted_nodes(
        peft.load(edited("linear", drop, layers_to_transform=[0, 2]), BASE, PLAIN)
    )
    assert len(nodes) == 4


def test_ranks_other_than_the_configurations(edited):
    folder = edited("linear", rank_pattern={"layers.1.up": 2})
    with pytest.raises(AdapterFileError) as caught:
        peft.load(folder, BASE, PLAIN)
    assert [line.rpartition("layers")[2] for line in str(caught.value).splitlines()[1:]] == [
        ".1.up.lora_A.weight: has shape (3, 6), needs (2, 6) at rank 2",
        ".1.up.lora_B.weight: has shape (10, 3), needs (10, 2) at rank 2",
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("strict", [True, False])
def test_values_that_are_not_finite(value, strict, edited):
    name = f"{PREFIX}model.layers.1.up.lora_A.weight"
    folder = edited("linear", lambda tensors: tensors[name].__setitem__((1, 2), value))
    with pytest.raises(AdapterFileError, match=r"NaN or infinite values in:\n.*layers.1.up.lora_A"):
        peft.load(folder, BASE, PLAIN, strict=strict)


def test_nothing_fits(edited):
    folder = edited("linear")
    with pytest.raises(AdapterFileError, match="nothing in this file fits the base"):
        peft.load(folder, {"head/kernel": BASE["head/kernel"]}, PLAIN, strict=False)


def test_missing_files_and_pickles(edited):
    folder = edited("linear")
    (folder / peft.TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterFileError, match=r"no such file; adapter_model.bin is a pickle"):
        peft.load(folder, BASE, PLAIN)


def test_shapes_are_enough(edited):
    for case in ("patterns", "dora", "bias all", "modules_to_save", "tokens"):
        folder = edited(case)
        equal(peft.load(folder, SHAPES, PLAIN), peft.load(folder, BASE, PLAIN))
    with pytest.raises(AdapterFileError) as caught:
        peft.load(edited("lora_bias"), SHAPES, PLAIN)
    assert str(caught.value).count("lora_bias adds to this bias") == 3


def test_a_joined_tree_is_a_base_too(edited):
    folder = edited("linear")
    joined = lora_jax.join(BASE, peft.load(folder, BASE, PLAIN))
    equal(peft.load(folder, joined, PLAIN), peft.load(folder, BASE, PLAIN))


def test_a_copy_of_the_base_weight_must_be_the_bases(edited):
    """PEFT saves the weights of adapted embeddings together with the factors."""
    name, weight = f"{PREFIX}model.emb.base_layer.weight", np.array(BASE["model/emb/embedding"])
    add = lambda x: lambda tensors: tensors.__setitem__(name, x)
    want = peft.load(edited("embedding"), BASE, PLAIN)
    equal(peft.load(edited("embedding", add(weight)), BASE, PLAIN), want)
    half = np.asarray(jnp.asarray(weight, jnp.bfloat16))
    equal(peft.load(edited("embedding", add(half)), BASE, PLAIN), want)
    with pytest.raises(AdapterFileError, match="has a base weight that differs"):
        peft.load(edited("embedding", add(weight + 0.1)), BASE, PLAIN)
    with pytest.raises(AdapterFileError, match=r"model.emb: .* has 18 tokens, this base 17"):
        peft.load(edited("embedding", add(np.ones((18, 6), "f4"))), BASE, PLAIN)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ({"other": [1, 2, 3]}, "does not say which rows"),
        (None, "does not say which rows"),
        ({"emb": [1, 2]}, r"has shape \(3, 6\), needs \(2, 6\)"),
        ({"emb": [1, 2, 17]}, "duplicates, or rows >= 17"),
        ({"emb": [1, 2, 1]}, "duplicates, or rows >= 17"),
    ],
)
def test_rows_that_cannot_be(indices, message, edited):
    with pytest.raises(AdapterFileError, match=message):
        peft.load(edited("tokens", trainable_token_indices=indices), BASE, PLAIN)
    rows = peft.load(edited("tokens", trainable_token_indices=[9, 2, 13]), BASE, PLAIN)
    assert rows["model/emb/embedding"].rows == (9, 2, 13)


def test_the_dtype_can_be_chosen(edited):
    stored = peft.load(edited("bfloat16"), BASE, PLAIN)[UP]
    assert (stored.a.dtype, stored.b.dtype, stored.scale.dtype) == ("bfloat16",) * 2 + ("float32",)
    wide = peft.load(edited("bfloat16"), BASE, PLAIN, dtype=jnp.float32)[UP]
    assert wide.a.dtype == wide.b.dtype == "float32"
    np.testing.assert_array_equal(wide.a, stored.a.astype("float32"))


def test_layers_that_the_file_lacks_are_off(edited):
    node = peft.load(edited("one module"), models.base("stacked"), STACKED)[
        "model/layers/up/kernel"
    ]
    np.testing.assert_array_equal(node.scale != 0, [False, True, False])
    assert not node.a[0].any() and not node.b[2].any() and node.a[1].any()


def test_ranks_within_a_stack_are_padded(edited, tmp_path):
    adapters = peft.load(edited("patterns"), models.base("stacked"), STACKED)
    down = adapters["model/layers/down/kernel"]
    assert down.a.shape == (3, 10, 5) and not down.a[0, :, 3:].any() and down.a[2, :, 3:].any()
    config = tmp_path / "again"
    peft.save(config, adapters, STACKED, base=models.base("stacked"))
    read = peft.read_config(config)
    assert [read.rank(f"model.layers.{n}.down") for n in range(3)] == [3, 3, 5]


def test_a_layer_that_is_off_is_not_written(tmp_path):
    config = lora_jax.LoraConfig(
        rank=2, targets=["down/kernel"], overrides={"down": {"layout": "bio"}}, layers=[0, 2]
    )
    params = lora_jax.init(jax.random.key(0), models.base("stacked"), config)
    peft.save(tmp_path, params, STACKED)
    modules = {
        name.split(".lora")[0] for name in safetensors_file.headers(tmp_path / peft.TENSORS).tensors
    }
    assert modules == {f"{PREFIX}model.layers.{n}.down" for n in (0, 2)}
    written = peft.read_config(tmp_path)
    assert written.target_modules == ("model.layers.0.down", "model.layers.2.down")
