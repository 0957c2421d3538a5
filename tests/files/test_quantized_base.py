"""Adapter files and quantized bases: the codes, the values, and what differs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.files.disk.fingerprint import fingerprint
from tests.adapters.quantized import tiny
from tests.adapters.quantized.tiny import IDS, adapted, base, dense, loss, model, plain


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "a.safetensors"
    lora.save(path, tiny.joined())
    return path


def test_the_same_codes_and_the_same_values_are_the_same_base(file, tmp_path):
    joined = tiny.joined()
    for same in (base(), dense(), jax.tree.map(jnp.copy, base())):
        overlay = lora.load(file, same)
        np.testing.assert_allclose(loss(lora.join(same, overlay)), loss(joined), rtol=1e-5)
    lora.save(tmp_path / "b.safetensors", adapted(dense()))
    lora.load(tmp_path / "b.safetensors", base())  # its values are those
    lora.load(file, jax.eval_shape(lambda p: p, base()))


@pytest.mark.filterwarnings("ignore::lora_jax.BaseKindWarning")
def test_other_kinds_are_told_and_load(file, tmp_path):
    int8 = lora.quantize(plain(), "int8", model, IDS, targets=["table", "kernel"])
    floating = r"layers/up/kernel: is float32\[2,64,96\], and .* float32\[2,64,96\] as int4"
    with pytest.warns(lora.BaseKindWarning, match=floating):
        overlay = lora.load(file, plain())
    assert overlay["layers"]["up"]["kernel"].a.shape == (2, 64, 2)
    with pytest.warns(lora.BaseKindWarning, match=r"up/kernel: is float32\[2,64,96\] as int8, and"):
        lora.load(file, int8)
    lora.save(tmp_path / "b.safetensors", adapted(plain()))
    with pytest.warns(lora.BaseKindWarning, match=r"as int4, and .* on float32\[2,64,96\]"):
        lora.load(tmp_path / "b.safetensors", base())


def test_other_codes_of_the_kind_are_another_base(file):
    changed = {
        **base(),
        "table": lora.quantize({"t": 2 * plain()["table"]}, "int8", axes={"t": 1})["t"],
    }
    with pytest.raises(lora.AdapterFileError, match="table: other values than the adapters"):
        lora.load(file, changed)
    other_leaf = {**plain(), "layers": jax.tree.map(lambda x: x + 1, plain()["layers"])}
    with pytest.raises(lora.AdapterFileError, match="layers/up/bias: other values"):
        lora.load(file, other_leaf)


def test_checksums_see_every_bit_and_not_where_codes_lie():
    found = fingerprint(base())
    w = base()["layers"]["up"]["kernel"]
    for name, array in w.fields.items():
        bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")
        flipped = bits.at[1, 0, 3].set(bits[1, 0, 3] ^ 1)
        changed = {**w.fields, name: jax.lax.bitcast_convert_type(flipped, array.dtype)}
        other = type(w)(changed, w.kind, w.axis, w.dtype)
        assert fingerprint({"w": other})["w"] != found["layers/up/kernel"]
    values = fingerprint(dense())["layers/up/kernel"].partition(":mix_")[2]
    assert found["layers/up/kernel"].endswith(values)
