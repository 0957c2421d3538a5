"""The names and the order of rows of each family in llama.cpp: our file has the tensors that its
convert_lora_to_gguf.py (of llama-cpp-python 0.3.36) makes of the same PEFT adapter."""

import json
import pathlib
import types

import jax
import numpy as np
import pytest

from lora_jax import gguf, models, peft
from lora_jax.files.disk import safetensors_file
from lora_jax.files.orbax.nested import nest
from lora_jax.models.decoder.gguf_names import KNOWN
from tests.parity.llama_cpp import families

FILE = pathlib.Path(__file__).parent / "families.npz"


def model(family):
    """Our model of a family, as far as its names and its adaptable leaves go."""
    layer = nest(
        {
            (*path, "kernel"): jax.ShapeDtypeStruct(shape, "float32")
            for path, shape in families.leaves(family).items()
        }
    )
    naming = models.naming(family)
    return types.SimpleNamespace(
        settings=families.config(family), naming=naming, params={"layer_0": layer}
    )


@pytest.mark.parametrize("family", families.FAMILIES)
def test_our_file_has_the_converters_tensors(family, tmp_path):
    with np.load(FILE) as recorded:
        (tmp_path / "theirs.gguf").write_bytes(recorded[family].tobytes())
    tensors, values = families.adapter(family)
    safetensors_file.write(tmp_path / peft.TENSORS, tensors, {"format": "pt"})
    (tmp_path / peft.CONFIG).write_text(json.dumps(values))
    ours, names = model(family), models.gguf_names(model(family))
    modules = models.naming(family, [*tensors])  # one for each expert
    adapters = peft.load(tmp_path, ours.params, modules)
    gguf.save(tmp_path / "ours.gguf", adapters, names, base=ours.params)
    wanted, got = (gguf.read_file(tmp_path / f"{x}.gguf") for x in ("theirs", "ours"))
    assert got.architecture == wanted.architecture and got.alpha == wanted.alpha == 2.0
    assert got.tensors.keys() == wanted.tensors.keys()
    for name, x in wanted.tensors.items():
        np.testing.assert_array_equal(got.tensors[name], x)
    back = gguf.load(tmp_path / "theirs.gguf", ours.params, names)
    jax.tree.map(np.testing.assert_array_equal, adapters, back)


def test_every_family_is_here():
    assert {*families.FAMILIES} == {*KNOWN} - {"gpt_oss"}  # which PEFT adapts in another way
