"""Adapters that mlx-lm trained, against the weights that mlx-lm fuses."""

import json
import pathlib

import jax
import numpy as np
import pytest

import lora_jax
from lora_jax import AdapterFileError, StructureError, mlx
from lora_jax.core.tree import adapted_nodes
from lora_jax.files.disk import safetensors_file
from lora_jax.files.naming import Entry, Naming, to_torch, to_tree
from tests.parity.peft.models import meaning

RECORDED = np.load(pathlib.Path(__file__).parent / "mlx.npz")
BASE = {name[5:]: RECORDED[name] for name in RECORDED.files if name.startswith("base/")}
CASES = sorted({n.split("/")[0] for n in RECORDED.files if n.endswith(".safetensors")})
ROWS = (
    Entry("embed.weight", "embed/embedding", "embedding"),
    Entry("{*m}.bias", "{*m}/bias"),
    Entry("{*m}.weight", "{*m}/kernel", "linear"),
)
PLAIN = Naming(ROWS)
STACKED = Naming(
    (
        Entry("layers.{n}.attention.q.weight", "layers/q/kernel", "linear", "(h d) i -> n i h d"),
        Entry("layers.{n}.attention.q.bias", "layers/q/bias", axes="(h d) -> n h d"),
        Entry("layers.{n}.up.weight", "layers/up/kernel", "linear", "o i -> n i o"),
        *ROWS,
    )
)


def base(naming):
    shapes = {"embed/embedding": (9, 6)}
    if naming is STACKED:
        shapes |= {"layers/q/kernel": (3, 6, 4, 2), "layers/q/bias": (3, 4, 2)}
        shapes |= {"layers/up/kernel": (3, 6, 10)}
    else:
        for n in range(3):
            shapes |= {f"layers/{n}/attention/q/kernel": (6, 8), f"layers/{n}/up/kernel": (6, 10)}
            shapes |= {f"layers/{n}/attention/q/bias": (8,)}
    like = {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in shapes.items()}
    return to_tree(naming, BASE, like)


def unpack(case, folder):
    for file in (mlx.CONFIG, mlx.TENSORS):
        (folder / file).write_bytes(RECORDED[f"{case}/{file}"].tobytes())
    return folder


@pytest.mark.parametrize("naming", [PLAIN, STACKED], ids=["plain", "stacked"])
@pytest.mark.parametrize("case", CASES)
def test_merged_weights_equal_mlxs(case, naming, tmp_path):
    tree = base(naming)
    adapters = mlx.load(unpack(case, tmp_path), tree, naming)
    merged = {path: np.asarray(x) for path, x in tree.items()}
    for path, node in adapted_nodes(adapters).items():
        merged[path] = meaning(node, merged[path])
    for name, x in to_torch(naming, merged).items():
        np.testing.assert_allclose(x, RECORDED[f"{case}/merged/{name}"], atol=1e-5, err_msg=name)
    # and written again: the same tensors, but for layers that were left out
    mlx.save(tmp_path / "again", adapters, naming, base=tree)
    want, _ = safetensors_file.read(tmp_path / mlx.TENSORS)
    got, _ = safetensors_file.read(tmp_path / "again" / mlx.TENSORS)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])
    configs = [json.loads((d / mlx.CONFIG).read_text()) for d in (tmp_path, tmp_path / "again")]
    old, new = (config["lora_parameters"] for config in configs)
    assert new["rank"] == old["rank"] and new["scale"] == old["scale"]
    assert new["keys"] == sorted(old["keys"])
    assert configs[0]["fine_tune_type"] == configs[1]["fine_tune_type"]


def test_a_lookup_and_its_tied_head_with_a_magnitude_for_each_row(tmp_path):
    """Compare the function, not only the merged weight."""
    tree = base(PLAIN)
    adapters = mlx.load(unpack("dora embedding", tmp_path), tree, PLAIN)
    node = adapters["embed/embedding"]
    assert node.layout.axes == "oi" and node.magnitude.shape == (9,)

    def function(params, ids):
        x = params["embed/embedding"][ids]
        return x, x @ params["embed/embedding"].T

    ids = np.array([[1, 8], [4, 4]])
    adapted = lora_jax.lora(function, on_dense="error")
    got = jax.jit(adapted)(lora_jax.join(tree, adapters), ids)
    table = RECORDED["dora embedding/merged/embed.weight"]
    np.testing.assert_allclose(got[0], table[ids], atol=1e-5)
    np.testing.assert_allclose(got[1], table[ids] @ table.T, atol=1e-5)


def test_dora_of_columns_is_not_mlxs(tmp_path):
    config = lora_jax.LoraConfig(
        rank=2, targets=["embedding"], dora=True, overrides={"embed": {"layout": "io"}}
    )
    params = lora_jax.init(jax.random.key(0), base(PLAIN), config)
    with pytest.raises(StructureError, match=r"embed.weight: .* one per row: give it the l"):
        mlx.save(tmp_path / "new", params, PLAIN)


def test_ranks_and_scales_become_one(tmp_path):
    config = lora_jax.LoraConfig(
        rank=2, alpha=3, targets=["up/kernel"], overrides={"2/up": {"rank": 4, "alpha": 5}}
    )
    params = lora_jax.init(jax.random.key(0), base(PLAIN), config)
    moved = jax.tree.map(lambda x: x + 0.5 if x.ndim else x, lora_jax.split(params)[1])
    mlx.save(tmp_path, moved, PLAIN)
    again = adapted_nodes(mlx.load(tmp_path, base(PLAIN), PLAIN))
    for path, node in adapted_nodes(moved).items():
        assert again[path].rank == 4 and float(again[path].scale) == 1.5
        zero = np.zeros(again[path].shape, "f4")
        np.testing.assert_allclose(meaning(again[path], zero), meaning(node, zero), rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fine_tune_type": "full"}, "fine_tune_type must be lora or dora, got 'full'"),
        ({"lora_parameters": {"scale": "20"}}, "lora_parameters.scale must be a number, got '20'"),
        ({"lora_parameters": [20]}, "lora_parameters.scale must be a number, got None"),
        ({"lora_parameters": {"scale": 10**400}}, "'scale': the number 10*.*is beyond"),
    ],
)
def test_settings_that_cannot_be(settings, message, tmp_path):
    folder = unpack("lora", tmp_path)
    text = json.loads((folder / mlx.CONFIG).read_text()) | settings
    (folder / mlx.CONFIG).write_text(json.dumps(text))
    with pytest.raises(AdapterFileError, match=message):
        mlx.load(folder, base(PLAIN), PLAIN)


def test_everything_wrong_is_told_at_once(tmp_path):
    folder = unpack("lora", tmp_path)
    tensors, _ = safetensors_file.read(folder / mlx.TENSORS)
    del tensors["embed.lora_b"]
    tensors["layers.0.up.lora_a"] = tensors["layers.0.up.lora_a"].T
    tensors["layers.1.up.lora_b"] = tensors["layers.1.up.lora_b"].astype("i4")
    tensors["layers.2.up.m"] = np.ones(10, "f4")
    tensors["layers.7.up.lora_a"] = np.ones((6, 2), "f4")
    safetensors_file.write(folder / mlx.TENSORS, tensors)
    with pytest.raises(AdapterFileError) as caught:
        mlx.load(folder, base(PLAIN), PLAIN)
    lines = [line.partition(": ")[0] for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        *("embed.lora_b", "layers.0.up", "layers.1.up.lora_b"),
        *("layers.2.up.m", "layers.7.up.lora_a"),
    ]
    (folder / mlx.TENSORS).unlink()
    with pytest.raises(AdapterFileError, match=r"adapters.safetensors: no such file"):
        mlx.load(folder, base(PLAIN), PLAIN)


def test_what_the_format_cannot_hold(tmp_path):
    config = lora_jax.LoraConfig(rank=2, targets=["up/kernel"], bias="all")
    params = lora_jax.init(jax.random.key(0), base(PLAIN), config)
    with pytest.raises(StructureError, match=r"layers.0.attention.q.bias: is fully trained"):
        mlx.save(tmp_path / "new", params, PLAIN)
    assert not (tmp_path / "new").exists()
