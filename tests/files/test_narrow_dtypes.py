"""Scales multiplied into factors of narrow dtypes: the update stays, or nothing is written."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import LoraWeight, StructureError, mlx, peft
from lora_jax.core.layout import Layout
from lora_jax.files.disk import safetensors_file
from lora_jax.files.naming import Entry, Naming
from lora_jax.files.torch_adapters.factors import TorchFactors, join_factors

NAMING = Naming((Entry("{*m}.weight", "{*m}/kernel", "linear"),))
EXPERTS = Naming(
    (
        Entry("moe.up", "moe/kernel", "experts"),
        Entry("q.weight", "q/kernel", "linear"),
    )
)
#: The dtype, the sizes of A and B, and the scale.
CASES = {
    "B overflows": ("float16", 1e-2, 3e4, 16.0),
    "B underflows": ("float16", 1e-1, 3e-6, 1 / 64),
    "both are large": ("float16", 3e4, 3e4, 16.0),
    "both are small": ("float16", 2e-7, 2e-7, 1 / 64),
    "bfloat16": ("bfloat16", 1e-2, 2e38, 16.0),
    "float32": ("float32", 1e-2, 2e38, 64.0),
    "float32 underflows": ("float32", 1.0, 1e-38, 1e-6),
    "nothing happens": ("float16", 1e-2, 1e-2, 4.0),
}


def node(dtype, a, b, scale, axes="io", batch=()):
    rng = np.random.default_rng(0)
    one = lambda size, *shape: jnp.asarray(size * rng.uniform(0.3, 1, shape), dtype)
    scales = jnp.full(batch, scale, "float32")
    return LoraWeight(None, one(a, *batch, 5, 2), one(b, *batch, 2, 3), scales, layout=Layout(axes))


def update(one):
    """The definition, in float64."""
    a, b = (np.asarray(x, "float64") for x in (one.a, one.b))
    return np.asarray(one.scale, "float64")[..., None, None] * (a @ b)


def assert_same(got, want, dtype):
    """To a few roundings of the dtype; infinity and zero are far away."""
    assert np.isfinite(got.a.astype("float32")).all() and np.isfinite(got.b.astype("float32")).all()
    tolerance = 4 * float(jnp.finfo(dtype).eps) * abs(update(want)).max()
    np.testing.assert_allclose(update(got), update(want), rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_folded_files_hold_the_update(case, tmp_path):
    one = node(*CASES[case])
    peft.save(tmp_path, {"up": {"kernel": one}}, NAMING, fold=True)
    base = {"up": {"kernel": jnp.zeros((5, 3))}}
    got = peft.load(tmp_path, base, NAMING)["up"]["kernel"]
    assert float(got.scale) == 1.0
    assert_same(got, one, CASES[case][0])
    if case == "nothing happens":  # A is not touched, B is rounded once
        np.testing.assert_array_equal(got.a, one.a)
        np.testing.assert_array_equal(got.b, np.asarray(one.b, "f8") * 4.0)
    if case in ("B overflows", "bfloat16", "nothing happens"):
        assert got.a.dtype == got.b.dtype == CASES[case][0]


@pytest.mark.parametrize("case", [name for name in CASES if name != "nothing happens"])
def test_mlx_files_have_one_scale(case, tmp_path):
    one = node(*CASES[case])
    others = {name: {"kernel": node("float32", 1, 1, 1.0)} for name in ("down", "out")}
    mlx.save(tmp_path, {"up": {"kernel": one}} | others, NAMING)
    base = {name: {"kernel": jnp.zeros((5, 3))} for name in ("up", "down", "out")}
    got = mlx.load(tmp_path, base, NAMING)
    assert float(got["up"]["kernel"].scale) == 1.0
    assert_same(got["up"]["kernel"], one, CASES[case][0])


@pytest.mark.parametrize("case", CASES)
def test_experts(case, tmp_path):
    one = node(*CASES[case], axes="bio", batch=(3,))
    scales = one.scale * jnp.array([1.0, 0.5, 1.0])  # a file has one scale for all experts
    one = dataclasses.replace(one, scale=scales)
    tree = {"moe": {"kernel": one}, "q": {"kernel": node("float32", 1, 1, 1.0)}}
    base = {"moe": {"kernel": jnp.zeros((3, 5, 3))}, "q": {"kernel": jnp.zeros((5, 3))}}
    for fold in (False, True):
        peft.save(tmp_path, tree, EXPERTS, base=base, fold=fold)
        got = peft.load(tmp_path, base, EXPERTS)["moe"]["kernel"]
        assert_same(got, one, CASES[case][0])


@pytest.mark.parametrize("case", CASES)
def test_modules_joined_in_one_leaf(case):
    dtype, a, b, scale = CASES[case]
    rng = np.random.default_rng(0)
    one = lambda size, *shape: np.asarray(jnp.asarray(size * rng.uniform(0.3, 1, shape), dtype))
    first = TorchFactors(one(a, 2, 5), one(b, 3, 2), scale)
    other = TorchFactors(np.ones((2, 5), "float16"), np.ones((3, 2), jnp.bfloat16), 1.0)
    joined = join_factors([first, other], [3, 3])
    want = np.concatenate([first.update(), other.update()])
    tolerance = 4 * float(jnp.finfo(dtype).eps) * abs(first.update()).max()
    np.testing.assert_allclose(joined.update()[:3], first.update(), rtol=0, atol=tolerance)
    np.testing.assert_allclose(joined.update()[3:], want[3:], rtol=1e-2)


@pytest.mark.parametrize("save", [peft.save, mlx.save])
@pytest.mark.parametrize(
    "wrong",
    [
        {"a": jnp.full((5, 2), jnp.nan)},
        {"b": jnp.full((2, 3), jnp.inf)},
        {"scale": jnp.float32(jnp.nan)},
        {"a": jnp.ones((5, 2), "float8_e4m3fn")},
    ],
    ids=["nan", "inf", "scale", "float8"],
)
def test_what_load_refuses_is_not_written(save, wrong, tmp_path):
    good = node("float32", 1, 1, 2.0)
    tree = {"up": {"kernel": dataclasses.replace(good, **wrong)}, "down": {"kernel": good}}
    with pytest.raises(StructureError, match=r"up.weight: (has NaN|is float8)"):
        save(tmp_path / "out", tree, NAMING)
    assert not (tmp_path / "out").exists()


def test_an_update_beyond_float32_is_not_written(tmp_path):
    tree = {"up": {"kernel": node("float32", 3e38, 3e38, 64.0)}}
    with pytest.raises(StructureError, match=r"up.weight: .*exceeds float32"):
        peft.save(tmp_path / "out", tree, NAMING, fold=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("read", [peft.load, mlx.load], ids=["peft", "mlx"])
@pytest.mark.parametrize("strict", [True, False])
def test_float64_that_jax_narrows_to_infinity(read, strict, tmp_path):
    save, module = (peft.save, peft) if read is peft.load else (mlx.save, mlx)
    save(tmp_path, {n: {"kernel": node("float32", 1, 1, 2.0)} for n in ("up", "down")}, NAMING)
    tensors, metadata = safetensors_file.read(tmp_path / module.TENSORS)
    name = next(name for name in tensors if "up" in name)
    tensors[name] = tensors[name].astype("float64") * 1e200
    safetensors_file.write(tmp_path / module.TENSORS, tensors, metadata)
    base = {name: {"kernel": jnp.zeros((5, 3))} for name in ("up", "down")}
    if strict:
        with pytest.raises(lora_jax.AdapterFileError, match="up/kernel: has values that overflow"):
            read(tmp_path, base, NAMING)
        return
    with pytest.warns(UserWarning, match="up/kernel: has values that overflow"):
        assert read(tmp_path, base, NAMING, strict=False)["up"]["kernel"] is None
