"""`models.load(quantize="keep")` on GGUF files: their codes, and the values of a float load."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import models
from lora_jax.core.errors import ConfigError, ModelFileError, StructureError
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.quantized.weight import is_quantized
from lora_jax.files.disk import gguf_file
from tests import devices
from tests.models import quantized_gguf

# as llama.cpp's mixes: one kind for most, others for the embedding and some of the layers
MIX = {"token_embd": "Q8_0", "blk.1.ffn_down": "Q6_K", "attn_v": "Q5_K", "attn_output": "BF16"}
MIX |= {"": "Q4_K"}
PLAIN = {"token_embd": "Q4_0", "attn_v": "Q5_0", "ffn_down": "Q5_1", "attn_q": "F16", "": "Q4_1"}


def dequantized(params):
    values = lambda w: w.dequantize() if is_quantized(w) else w.astype(jnp.float32)
    return jax.tree.map(values, params, is_leaf=is_quantized)


def nbytes(params):
    return sum(x.nbytes for x in jax.tree.leaves(params))


def kind_of(leaf):
    return leaf.kind if is_quantized(leaf) else str(leaf.dtype)


@pytest.mark.parametrize(("kinds", "tied", "scan"), [(MIX, False, False), (PLAIN, True, True)])
def test_the_codes_of_the_file_are_the_values_of_a_float_load(tmp_path, kinds, tied, scan):
    path = quantized_gguf.write(tmp_path / "x.gguf", kinds, tied)
    kept = models.load(path, quantize="keep", scan=scan)
    floats = models.load(path, scan=scan)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(dequantized)(kept.params), floats.params)
    assert nbytes(kept.params) <= os.path.getsize(path)
    found = {path: kind_of(leaf) for path, leaf in flatten_with_paths(kept.params)[0].items()}
    if scan:
        assert found["layers/attention/query/kernel"] == "float16"
        assert found["layers/attention/value/kernel"] == "q5_0"
    else:
        assert found["layer_0/mlp/down/kernel"] == "q4_k"
        assert found["layer_1/mlp/down/kernel"] == "q6_k"
        assert found["layer_1/attention/output/kernel"] == "bfloat16"
    assert found["norm/scale"] == "float32"


@pytest.mark.slow  # test_smollm2 and the engine's tests have the parts of it
def test_logits_and_gradients_are_those_of_the_float_model(tmp_path):
    path = quantized_gguf.write(tmp_path / "x.gguf", {"embd": "Q8_0", "": "Q4_K"}, tied=True)
    kept, floats = models.load(path, quantize="keep", scan=True), models.load(path, scan=True)
    ids = jnp.arange(12).reshape(2, 6) % quantized_gguf.VOCABULARY
    config = lora_jax.LoraConfig(rank=2)
    tree = lora_jax.init(jax.random.key(0), kept.params, config, kept.apply, ids)
    base, adapters = lora_jax.split(tree)
    adapters = jax.tree.map(lambda x: x + 0.01, adapters)

    @jax.jit
    def run(base, adapters):
        def loss(adapters):
            logits = lora_jax.lora(kept.apply)(lora_jax.join(base, adapters), ids)
            return (logits**2).mean(), logits

        return jax.value_and_grad(loss, has_aux=True)(adapters)

    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-5)
    jax.tree.map(close, run(base, adapters), run(floats.params, adapters))


def test_a_model_of_codes_is_called_through_lora(tmp_path):
    kept = models.load(quantized_gguf.write(tmp_path / "x.gguf", PLAIN, True), quantize="keep")
    message = (
        r"parameters of the model are quantized, first QuantizedWeight\(.*: call "
        r"lora_jax.lora\(model.apply\)\(params, ...\) instead of model.apply"
    )
    with pytest.raises(StructureError, match=message):
        kept.apply(kept.params, jnp.ones((1, 2), int))


def test_another_vocabulary_and_an_untied_head(tmp_path):
    kept = models.load(quantized_gguf.write(tmp_path / "x.gguf", PLAIN, True), quantize="keep")
    table = kept.params["embedding"]["embedding"]
    head = models.untie_head(kept).params["head"]["kernel"]
    assert head.kind == "q4_0" and head.shape == table.shape[::-1]
    for name, field in table.fields.items():
        np.testing.assert_array_equal(head.fields[name], field.T)
    grown = models.resize_vocabulary(kept, 100).params["embedding"]["embedding"]
    np.testing.assert_array_equal(grown[:96], table.dequantize())


@pytest.mark.parametrize(
    ("scale", "dtype", "message"),
    [
        (np.inf, None, "blk.1.ffn_up.weight: contains NaN or infinite values"),
        (60000, "float16", "blk.1.ffn_up.weight: has values that overflow float16"),
    ],
)
def test_scales_that_are_too_large(tmp_path, scale, dtype, message):
    path = quantized_gguf.write(tmp_path / "x.gguf", {"": "Q8_0"})
    tensor = gguf_file.read(path).tensors["blk.1.ffn_up.weight"]
    data = bytearray(path.read_bytes())
    at = data.find(tensor.stored[:64].tobytes())
    data[at : at + 2] = np.array([scale], np.float16).tobytes()
    path.write_bytes(data)
    with pytest.raises(ModelFileError, match=message):
        models.load(path, dtype, quantize="keep", scan=True)


def test_layers_of_several_kinds_are_not_stacked(tmp_path):
    path = quantized_gguf.write(tmp_path / "x.gguf", MIX)
    message = (
        r"layers/mlp/down/kernel: quantize='keep' cannot stack tensors of several kinds: 1 q4_k, "
        r"1 q6_k. Load the model with scan=False"
    )
    with pytest.raises(ConfigError, match=message):
        models.load(path, quantize="keep", scan=True)


def test_types_without_a_kind_become_floats_with_a_warning(tmp_path):
    path = quantized_gguf.write(tmp_path / "x.gguf", {"ffn_up": "Q2_K", "": "Q8_0"})
    message = (
        r"x.gguf: quantize='keep' reads 2 tensors as floats, because their types cannot be kept as "
        r"codes \(2 Q2_K; first blk.0.ffn_up.weight\): 0.1 MB in the file, 1.0 MB in memory"
    )
    with pytest.warns(UserWarning, match=message):
        kept = models.load(path, quantize="keep")
    up = kept.params["layer_1"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(up, models.load(path).params["layer_1"]["mlp"]["up"]["kernel"])


def test_an_unknown_quantize_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"quantize: 'kept' is not a kind; .* or 'keep' for the codes"
    ):
        models.load(tmp_path, quantize="kept")


def test_the_dtype_is_that_which_the_codes_stand_for(tmp_path):
    path = quantized_gguf.write(tmp_path / "x.gguf", PLAIN)
    kept = models.load(path, "bfloat16", quantize="keep").params
    codes, half = (kept["layer_0"]["attention"][name]["kernel"] for name in ("key", "query"))
    assert (codes.dtype, half.dtype) == (jnp.bfloat16, jnp.float16)
    values = models.load(path).params["layer_0"]["attention"]["key"]["kernel"]
    np.testing.assert_array_equal(codes.dequantize(), values.astype(jnp.bfloat16))
    assert kept["norm"]["scale"].dtype == jnp.float32


def test_codes_are_sharded_as_weights_but_blocks_stay_whole(tmp_path):
    path = quantized_gguf.write(tmp_path / "x.gguf", MIX)
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), devices=devices.some(4))
    kept, whole = (models.load(path, quantize="keep", mesh=m).params for m in (mesh, None))
    jax.tree.map(np.testing.assert_array_equal, kept, whole)
    mlp = kept["layer_0"]["mlp"]
    spec = lambda w: {name: tuple(x.sharding.spec) for name, x in w.fields.items()}
    assert set(spec(mlp["down"]["kernel"]).values()) == {("tensor", "fsdp")}  # two blocks of 256
    assert set(spec(mlp["up"]["kernel"]).values()) == {(None, "tensor")}  # one block
    codes = mlp["down"]["kernel"].fields["codes"]
    assert codes.addressable_shards[0].data.shape == (128, 128)
