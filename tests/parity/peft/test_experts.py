"""Adapters of experts' parameters: files of peft 0.21.2 read and written, and what is rejected."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import lora_jax
from lora_jax import AdapterFileError, StructureError, mlx, peft
from lora_jax.core.tree import adapted_nodes
from lora_jax.files.disk import safetensors_file
from lora_jax.files.naming import Entry, Naming
from tests.parity.peft import models
from tests.parity.peft.experts_model import CASES, NAMING, RECORDED, SHAPES, apply, base, unpack

PREFIX = "base_model.model."
BASE = base()
APPLY = jax.jit(apply)


@pytest.fixture
def folder(tmp_path):
    return lambda case: unpack(case, tmp_path / case)


def tensors_in(directory):
    return safetensors_file.read(directory / peft.TENSORS)[0]


def merged(adapters):
    tree = {path: np.asarray(x) for path, x in BASE.items()}
    return tree | {
        path: models.meaning(node, tree[path]) for path, node in adapted_nodes(adapters).items()
    }


def edited(directory, change=lambda tensors: None, **fields):
    config = json.loads((directory / peft.CONFIG).read_text()) | fields
    (directory / peft.CONFIG).write_text(json.dumps(config))
    tensors = tensors_in(directory)
    change(tensors)
    safetensors_file.write(directory / peft.TENSORS, tensors)
    return directory


@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_pefts(case, folder):
    adapters = peft.load(folder(case), BASE, NAMING)
    want = RECORDED[f"{case}/y"]
    np.testing.assert_allclose(APPLY(merged(adapters), RECORDED["x"]), want, atol=5e-6)
    assert np.abs(want - RECORDED["y"]).max() > 0.1  # the adapter does something


def test_adapted_outputs_equal_pefts(folder, quick_compile):
    """Nothing is materialized, though PEFT swaps one parameter's inputs and outputs."""
    params = lora_jax.join(BASE, peft.load(folder("patterns"), SHAPES, NAMING))
    y = jax.jit(lora_jax.lora(apply, on_dense="error"))(params, RECORDED["x"])
    np.testing.assert_allclose(y, RECORDED["patterns/y"], atol=5e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("given", [True, False])
def test_what_was_read_is_written_again(case, given, folder, tmp_path):
    """The same tensors under the same names, with the same ranks and scales."""
    config = peft.read_config(folder(case))
    adapters = peft.load(folder(case), BASE, NAMING)
    again = tmp_path / "again"
    peft.save(again, adapters, NAMING, base=BASE, config=config if given else None)
    want, got = tensors_in(folder(case)), tensors_in(again)
    assert got.keys() == want.keys()
    written = peft.read_config(again)
    assert written.lora_dropout == 0 and written.target_modules is not None
    if given:
        assert written.target_parameters == config.target_parameters
    scales = {}
    for name in want:  # other/gate and other/up have their own copy of A, and become one again
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    for which, file in (("want", config), ("got", written)):
        names = [x[5:] for x in RECORDED if x.startswith("base/") and "weight" not in x]
        names = [name for name in names if file.targets_parameter(name)]
        scales[which] = {n: (file.rank(n), np.float32(file.scale(n))) for n in names}
    assert scales["got"] == scales["want"]


def test_without_a_base_parameters_are_named_in_full(folder, tmp_path):
    adapters = peft.load(folder("one layer"), BASE, NAMING)
    peft.save(tmp_path, adapters, NAMING)
    assert peft.read_config(tmp_path).target_parameters == ("layers.1.experts.down_proj",)
    peft.save(tmp_path, peft.load(folder("both"), BASE, NAMING), NAMING)
    names = peft.read_config(tmp_path).target_parameters
    assert len(names) == 4 and all(name.startswith("layers.") for name in names)
    peft.save(tmp_path, peft.load(folder("both"), BASE, NAMING), NAMING, base=BASE)
    short = peft.read_config(tmp_path).target_parameters
    assert short == ("experts.down_proj", "experts.up_proj")


def test_ranks_and_scales_of_experts_that_differ(folder, tmp_path):
    """All experts share one rank and one scale: factors are padded, scales multiplied into B."""
    adapters = peft.load(folder("both"), BASE, NAMING)
    node = adapters["layers/up"]
    scale = np.array([[1.5, 3, 1.5], [0, 0, 0]], "f4")
    a, b = np.array(node.a), np.array(node.b)
    a[0, 2, :, 1] = b[0, 2, 1] = 0  # rank 1
    adapters["layers/up"] = dataclasses.replace(node, a=a, b=b, scale=scale)
    for fold in (False, True):
        peft.save(tmp_path, adapters, NAMING, base=BASE, fold=fold)
        names = [name.removeprefix(PREFIX) for name in tensors_in(tmp_path)]
        # layer 1 has no "up" any more, and is wrapped but once
        assert sorted(name for name in names if "layers.1" in name) == [
            "layers.1.experts.lora_A.weight",
            "layers.1.experts.lora_B.weight",
        ]
        want = merged(adapters)
        for path, x in merged(peft.load(tmp_path, BASE, NAMING)).items():
            np.testing.assert_allclose(x, want[path], atol=1e-6, err_msg=path)


def test_what_init_makes_is_written(tmp_path, quick_compile):
    """`init` knows the true inputs; a file swaps them wherever PEFT does."""
    config = lora_jax.LoraConfig(rank=2, alpha=3, targets=["up", "down", "gate", "q"], dropout=0.1)
    params = lora_jax.init(jax.random.key(0), BASE, config, apply, RECORDED["x"])
    assert params["last/up"].layout.axes == "bio"
    rng = np.random.default_rng(0)
    adapters = {
        path: dataclasses.replace(
            node, w=None, **{f: rng.normal(size=getattr(node, f).shape).astype("f4") for f in "ab"}
        )
        for path, node in adapted_nodes(params).items()
    }
    peft.save(tmp_path, adapters, NAMING, base=BASE, config=config)
    assert peft.read_config(tmp_path).lora_dropout == 0  # PEFT refuses it beside parameters
    again = peft.load(tmp_path, BASE, NAMING)
    assert again["last/up"].layout.axes == "boi"
    want = merged(adapters)
    for path, x in merged(again).items():
        np.testing.assert_allclose(x, want[path], atol=1e-5, err_msg=path)


def test_experts_in_groups(tmp_path):
    """A leaf with the experts on two separate axes gives the same file and the same update."""
    plain = Naming((Entry("m.up", "up", "experts"),))
    groups = Naming((Entry("m.up", "up", "experts", "(g e) o i -> e i g o", {"g": 2}),))
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype("f4")
    layout = lora_jax.Layout("bibo")
    node = lora_jax.LoraWeight(
        None, draw(3, 2, 4, 1), draw(3, 2, 1, 5), np.full((3, 2), 0.5, "f4"), layout=layout
    )
    peft.save(tmp_path, {"up": node}, groups)
    read = peft.load(tmp_path, {"up": jax.ShapeDtypeStruct((6, 4, 5), "float32")}, plain)["up"]
    want = models.meaning(node, np.zeros((3, 4, 2, 5), "f4")).transpose(2, 0, 1, 3)
    got = models.meaning(read, np.zeros((6, 4, 5), "f4"))
    np.testing.assert_allclose(got, want.reshape(6, 4, 5), rtol=1e-5, atol=1e-6)
    again = peft.load(tmp_path, {"up": jax.ShapeDtypeStruct((3, 4, 2, 5), "float32")}, groups)
    np.testing.assert_array_equal(again["up"].a, node.a)
    np.testing.assert_array_equal(again["up"].b, node.b)


def break_everything(tensors):
    layer = f"{PREFIX}layers.0.experts"
    del tensors[f"{layer}.lora_B.weight"]
    tensors[f"{layer}.base_layer.lora_A.weight"] = np.ones((6, 5), "f4")
    tensors[f"{layer}.base_layer.lora_magnitude_vector"] = np.ones(5, "f4")
    tensors[f"{layer}.base_layer.base_layer.lora_A.weight"] = np.ones((6, 5), "f4")


BROKEN = """
base_model.model.layers.0.experts.base_layer.base_layer.lora_A.weight: not in this base; nearest
base_model.model.layers.0.experts.base_layer.lora_A.weight: has shape (6, 5), needs (6, 4) at rank \
2 for the 3 experts of layers.0.experts.up_proj
base_model.model.layers.0.experts.base_layer.lora_magnitude_vector: unexpected for layers.0.experts
base_model.model.layers.0.experts.lora_B.weight: missing, (4, 6) for layers.0.experts.down_proj
target_parameters: 'experts.gate' is not a known parameter of experts; add to the
"""


def test_everything_wrong_is_told_at_once(folder):
    targets = ["experts.up_proj", "experts.down_proj", "experts.gate"]
    directory = edited(folder("both"), break_everything, target_parameters=targets)
    with pytest.raises(AdapterFileError) as caught:
        peft.load(directory, BASE, NAMING)
    _, *lines = str(caught.value).splitlines()
    for line, start in zip(lines, BROKEN.strip().splitlines(), strict=True):
        assert line.startswith(start)
    with pytest.warns(UserWarning, match="ignored what does not fit"):
        adapters = peft.load(directory, BASE, NAMING, strict=False)
    np.testing.assert_array_equal(adapters["layers/up"].scale != 0, [[False] * 3, [True] * 3])


def test_a_naming_without_experts(folder):
    rows = [row for row in NAMING.entries if not row.has_experts]
    tree = {path: x for path, x in BASE.items() if path in ("router", "q")}
    with pytest.raises(AdapterFileError, match=r"'last\.up' is not a known parameter of experts"):
        peft.load(folder("first axis in"), tree, Naming(rows))


def test_what_peft_cannot_have_beside_experts(folder, tmp_path):
    adapters = peft.load(folder("one layer"), BASE, NAMING)
    magnitude = np.ones((2, 4), "f4")
    whole = adapters | {"q": dataclasses.replace(adapters["q"], magnitude=magnitude)}
    with pytest.raises(StructureError, match=r"layers.0.q.weight: PEFT does not support DoRA"):
        peft.save(tmp_path / "new", whole, NAMING, base=BASE)
    node = adapters["layers/down"]
    node = dataclasses.replace(node, magnitude=np.ones((3, 2, 4), "f4"))
    with pytest.raises(StructureError, match="layers/down: PEFT does not support DoRA"):
        peft.save(tmp_path / "new", adapters | {"layers/down": node}, NAMING, base=BASE)
    with pytest.raises(StructureError, match="down_proj: adapters of experts' parameters"):
        mlx.save(tmp_path / "new", adapters, NAMING, base=BASE)
    assert not (tmp_path / "new").exists()
