"""Layers of experts against `transformers` 5.24; see record_models.py."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax import models
from lora_jax.files.torch_adapters.contents import TorchBase
from lora_jax.models.decoder.experts import ExpertsConfig, route
from lora_jax.models.decoder.naming import EXPERT_PARAMETERS
from tests.models.decoder.test_decoder import error
from tests.models.recorded import EXPERTS, FIXTURES, MIXED, expected, load

pytestmark = pytest.mark.usefixtures("quick_compile")
SLOW = pytest.mark.slow
BOTH = [
    pytest.param(name, scan, id=f"{name}-{'scan' if scan else 'unrolled'}", marks=marks)
    for name in EXPERTS
    for scan in (False, True)
    for marks in [() if scan and name == "gpt_oss" else SLOW]
]


@pytest.mark.parametrize(("name", "scan"), BOTH)
def test_logits_are_those_of_transformers(name, scan):
    model, given = load(name, scan=scan), expected(name)
    logits = jax.jit(model.apply)(model.params, given["ids"], given["mask"])
    assert error(name, logits) < 3e-5  # for logits up to 4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scan"), BOTH)
def test_greedy_tokens_are_those_of_transformers(name, scan):
    model, given = load(name, scan=scan), expected(name)
    cache = model.module.init_cache(2, 20)
    found = models.generate(
        model.apply, model.params, given["ids"], cache, steps=9, segments=given["mask"]
    )
    np.testing.assert_array_equal(found[:1], given["greedy"])


@pytest.mark.parametrize("name", [*EXPERTS, MIXED])
def test_saved_tensors_are_those_of_the_file(name, tmp_path):
    models.save(tmp_path, load(name, scan=name != MIXED))
    want, got = (load_file(path / "model.safetensors") for path in (FIXTURES / name, tmp_path))
    assert want.keys() == got.keys()
    for key, tensor in want.items():
        np.testing.assert_array_equal(got[key].view(np.int32), tensor.view(np.int32), key)


@pytest.mark.parametrize(
    ("name", "module", "gate", "up"),
    [
        ("mixtral", "block_sparse_moe.experts.1", "w1", "w3"),
        ("qwen3_moe", "mlp.experts.1", "gate_proj", "up_proj"),
    ],
)
def test_which_tensor_is_the_gate(name, module, gate, up):
    """In transformers 4 a module each; in transformers 5 one parameter, the gate first."""
    file = load_file(FIXTURES / name / "model.safetensors")
    gate, up = (file[f"model.layers.0.{module}.{x}.weight"] for x in (gate, up))
    params = load(name, scan=True).params
    experts = jax.tree.map(lambda x: x[0, 1], params["layers"]["mlp"]["experts"])
    np.testing.assert_array_equal(experts["gate"]["kernel"], gate.T)
    np.testing.assert_array_equal(experts["up"]["kernel"], up.T)
    joined = TorchBase(params, EXPERT_PARAMETERS).value("model.layers.0.mlp.experts.gate_up_proj")
    np.testing.assert_array_equal(joined[1], np.concatenate([gate, up]))


@pytest.mark.parametrize(
    ("shares", "want"),
    [("all", [0.5, 0.25]), ("normalized", [2 / 3, 1 / 3]), ("chosen", [2 / 3, 1 / 3])],
)
def test_shares_of_the_chosen_experts(shares, want):
    """Softmax of the logarithms of 1, 4 and 2 eighths, and of an eighth."""
    logits = jnp.log(jnp.array([[1.0, 4.0, 2.0, 1.0]]))
    found, experts = route(ExpertsConfig(4, 2, 8, shares), logits)
    np.testing.assert_allclose(found, [want], rtol=1e-6)
    assert experts.tolist() == [[1, 2]]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"expert": 4, "fsdp": 2}, {"expert": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("name", EXPERTS)
def test_on_a_mesh_they_give_the_same_loss_and_gradients(name, sizes):
    """The five experts of one model are not divided: the axis is left out."""
    kinds = (AxisType.Auto,) * len(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)
    ids = np.arange(4 * 9).reshape(4, 9) % 61
    config = lora.LoraConfig(rank=2, targets=["query", "down"])

    def found(model, put):
        params = lora.init(jax.random.key(0), model.params, config, model.apply, ids)
        base, adapters = lora.split(params)
        adapters = jax.tree.map(lambda x: x + 0.05, adapters)
        apply = lora.lora(model.apply)
        loss = lambda adapters: jnp.square(apply(lora.join(base, adapters), put(ids))).mean()
        return jax.jit(jax.value_and_grad(loss))(adapters)

    want = found(load(name, scan=True), lambda x: x)
    with jax.set_mesh(mesh):
        place = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("fsdp")))
        got = found(models.load(FIXTURES / name, scan=True, mesh=mesh), place)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-4, atol=1e-6)


def test_explicit_axes_are_refused():
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Explicit,))
    model = models.load(FIXTURES / "mixtral", scan=True, mesh=mesh)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"axis_types=\(AxisType\.Auto"):
        model.apply(model.params, np.zeros((2, 3), int))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3_moe", {"mlp_only_layers": [0.5]}, "mlp_only_layers must be a list of ints"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be a positive int"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is not supported"),
        ("mixtral", {"num_experts_per_tok": 9}, "9 chosen experts are more than all 4"),
        ("mixtral", {"num_local_experts": "4"}, "ExpertsConfig.count must be a positive int"),
        ("gpt_oss", {"swiglu_limit": 0}, "ExpertsConfig.limit must be a positive number"),
        ("gpt_oss", {"swiglu_alpha": "x"}, "ExpertsConfig.alpha must be a positive number"),
    ],
)
def test_other_configurations_are_refused(name, changes, message):
    config = type(load(name).config)
    with pytest.raises(ValueError, match=message):
        config.from_json({**load(name).settings, **changes})


@pytest.mark.parametrize("fields", [{"shares": "some"}, {"alpha": 1.0}, {"count": 0}])
def test_configurations_without_meaning(fields):
    with pytest.raises(ValueError, match="ExpertsConfig"):
        ExpertsConfig(**{"count": 4, "chosen": 2, "width": 8, **fields})


def test_experts_in_mxfp4(tmp_path):
    """gpt-oss as published: blocks of 32 E2M1 numbers and E8M0 scales, read as floats or kept."""
    settings = load("gpt_oss").settings | {
        **{
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_key_value_heads": 4,
        },
        "layer_types": ["full_attention"],
        "quantization_config": {"quant_method": "mxfp4"},
    }
    rng, small = np.random.default_rng(0), load_file(FIXTURES / "gpt_oss" / "model.safetensors")
    tensors, values = {}, {}
    for name, tensor in small.items():
        if "layers.1" in name or "layers.2" in name:
            continue
        shape = [{16: 32, 24: 32, 48: 64}.get(n, n) for n in tensor.shape]
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = shape
            blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
            scales = rng.integers(122, 126, blocks.shape[:3], np.uint8)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
            numbers = np.concatenate([numbers, -numbers])
            pairs = np.stack([numbers[blocks & 15], numbers[blocks >> 4]], -1)
            whole = pairs.reshape(*blocks.shape[:3], 32) * 2.0 ** (scales[..., None] - 127.0)
            values[name] = whole.reshape(experts, outputs, inputs).swapaxes(1, 2)
        else:
            tensors[name] = rng.normal(size=shape).astype(np.float32) * 0.3
    (tmp_path / "config.json").write_text(json.dumps(dict(settings)))
    save_file(tensors, tmp_path / "model.safetensors")
    ids = np.arange(1, 9)[None]
    floats = models.load(tmp_path, "float32")
    kept = models.load(tmp_path, "float32", quantize="keep")
    own = floats.params["layer_0"]["mlp"]["experts"]
    for name, leaf in {"gate_up_proj": "gate_up", "down_proj": "down"}.items():
        want = values[f"model.layers.0.mlp.experts.{name}"]
        np.testing.assert_array_equal(own[leaf]["kernel"], want)
        assert kept.params["layer_0"]["mlp"]["experts"][leaf]["kernel"].kind == "mxfp4"
    want = jax.jit(floats.apply)(floats.params, ids)
    got = jax.jit(lora.lora(kept.apply))(kept.params, ids)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
