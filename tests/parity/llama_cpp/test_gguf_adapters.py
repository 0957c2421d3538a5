"""GGUF adapters: llama.cpp (llama-cpp-python 0.3.36) computes with our files what we compute, and
what its convert_lora_to_gguf.py makes of a PEFT directory loads as that directory does."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import gguf, models, peft
from lora_jax.core.layout import Layout
from lora_jax.core.tree import adapted_nodes
from lora_jax.core.weights import LoraWeight, TrainedLeaf
from lora_jax.files.disk import gguf_writer, safetensors_file
from lora_jax.files.naming import Entry, Naming
from tests.parity.llama_cpp import tiny_model
from tests.parity.llama_cpp.adapters import CASES, factors

pytestmark = pytest.mark.usefixtures("quick_compile")
RECORDED = np.load(pathlib.Path(__file__).parent / "llama_cpp.npz")
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def peft_files(case, folder):
    """Write the factors of a case as a PEFT directory; ranks and alphas differ."""
    tensors, ranks, alphas = {}, {}, {}
    for module, (a, b, scale) in factors(case).items():
        names = ("lora_A.weight", "lora_B.weight")
        if module == EMBEDDING:
            names = ("lora_embedding_A", "lora_embedding_B")
        tensors |= {f"base_model.model.{module}.{n}": x for n, x in zip(names, (a, b), strict=True)}
        ranks[f"^{module}"], alphas[f"^{module}"] = len(a), scale * len(a)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": [*factors(case)]}
    config |= {"rank_pattern": ranks, "alpha_pattern": alphas, "bias": "none"}
    safetensors_file.write(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module", params=CASES)
def world(request, tmp_path_factory):
    """A model, its adapters from a PEFT directory, and its names in llama.cpp."""
    folder, case = tmp_path_factory.mktemp("gguf"), request.param
    architecture, tied, _ = CASES[case]
    tiny_model.write(folder / "model.gguf", architecture, tied)
    model = models.load(folder / "model.gguf")
    peft_files(case, folder)
    adapters = peft.load(folder, model.params, model.naming)
    return case, folder, model, adapters, models.gguf_names(model)


def assert_equal(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_llama_cpp_computes_the_same(world):
    case, folder, model, adapters, names = world
    gguf.save(folder / "adapter.gguf", adapters, names, base=model.params, base_model="me/tiny")
    # what llama.cpp read when the logits were recorded
    assert (folder / "adapter.gguf").read_bytes() == RECORDED[f"{case}/file"].tobytes()
    params = lora_jax.join(model.params, adapters)
    ids = jnp.array([tiny_model.IDS])
    logits = jax.jit(lora_jax.lora(model.apply))(params, ids)[0]
    np.testing.assert_allclose(logits, RECORDED[f"{case}/logits"], atol=2e-5)
    assert abs(logits - RECORDED[f"{case}/base"]).max() > 0.5


def update(node):
    """scale·A·B of a matrix, in float64."""
    return float(node.scale) * (np.asarray(node.a, float) @ np.asarray(node.b, float))


def test_what_is_written_loads(world):
    _, folder, model, adapters, names = world
    gguf.save(folder / "again.gguf", adapters, names, base=model.params)
    back = adapted_nodes(gguf.load(folder / "again.gguf", model.params, names))
    for path, node in adapted_nodes(adapters).items():
        np.testing.assert_allclose(update(back[path]), update(node), atol=1e-6)
    assert gguf.read_file(folder / "again.gguf").alpha == 6.0


def test_files_of_llama_cpps_converter(tmp_path):
    """It knows one alpha and no alpha_pattern, so this adapter has one rank and one scale."""
    (tmp_path / "adapter.gguf").write_bytes(RECORDED["converter/file"].tobytes())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(RECORDED[f"converter/{name}"].tobytes())
    tiny_model.write(tmp_path / "model.gguf", "llama")
    model = models.load(tmp_path / "model.gguf")
    wanted = peft.load(tmp_path, model.params, model.naming)
    got = gguf.load(tmp_path / "adapter.gguf", model.params, models.gguf_names(model))
    assert_equal(wanted, got)
    # and ours of the same adapters has the same tensors
    gguf.save(tmp_path / "ours.gguf", wanted, models.gguf_names(model), base=model.params)
    theirs, ours = (gguf.read_file(tmp_path / f"{n}.gguf") for n in ("adapter", "ours"))
    assert theirs.tensors.keys() == ours.tensors.keys() and theirs.alpha == ours.alpha
    assert_equal(theirs.tensors, ours.tensors)


NAMES = gguf.Names(
    "qwen3moe",
    Naming(
        (
            Entry("blk.{n}.ffn_up_exps.weight", "up_{n}", "experts"),
            Entry("blk.{n}.attn_v.weight", "value_{n}", "linear"),
            Entry("token_embd.weight", "tokens", "embedding"),
            Entry("blk.{n}.norm.weight", "norm_{n}"),
        )
    ),
)
SHAPES = {"up_0": (2, 4, 3), "value_0": (4, 5), "norm_0": (4,)}
BASE = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in SHAPES.items()}


def node(axes, a, b, dtype="float32", magnitude=None):
    draw = lambda shape: np.random.default_rng(0).normal(size=shape).astype(jnp.dtype(dtype))
    scale = np.full(a[: axes.count("b")], 1.5, "float32")
    return LoraWeight(None, draw(a), draw(b), scale, magnitude, layout=Layout(axes))


def made(dtype="float32"):
    return {
        "up_0": node("bio", (2, 4, 2), (2, 2, 3), dtype),
        "value_0": node("io", (4, 2), (2, 5), dtype),
        "norm_0": None,
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_experts_and_dtypes(dtype, tmp_path):
    adapters = made(dtype)
    gguf.save(tmp_path / "a.gguf", adapters, NAMES)
    file = gguf.read_file(tmp_path / "a.gguf")
    a, b = (file.tensors[f"blk.0.ffn_up_exps.weight.{x}"] for x in ("lora_a", "lora_b"))
    assert (a.shape, b.shape, a.dtype) == ((2, 2, 4), (2, 3, 2), dtype)
    assert_equal(adapters, gguf.load(tmp_path / "a.gguf", BASE, NAMES))


def test_without_alpha_the_scale_is_one(tmp_path):
    """`get_scale` in llama.cpp's llama-adapter.h; other values are alpha over each rank."""
    weight = "blk.0.attn_v.weight"
    tensors = {f"{weight}.lora_a": np.ones((2, 4), "f4"), f"{weight}.lora_b": np.ones((5, 2), "f4")}
    keys = {"general.architecture": "qwen3moe", "general.type": "adapter", "adapter.type": "lora"}
    for more, scale in (
        ({}, 1),
        ({"adapter.lora.alpha": 0.0}, 1),
        ({"adapter.lora.alpha": 3.0}, 1.5),
    ):
        (tmp_path / "a.gguf").write_bytes(gguf_writer.encode(keys | more, tensors))
        assert gguf.load(tmp_path / "a.gguf", BASE, NAMES)["value_0"].scale == scale


def test_what_llama_cpp_cannot_apply(tmp_path):
    adapters = made() | {"norm_0": TrainedLeaf(None, np.ones(4, "f4"), np.float32(1))}
    adapters["value_0"] = node("io", (4, 2), (2, 5), magnitude=np.ones(5, "f4"))
    with pytest.raises(lora_jax.StructureError) as caught:
        gguf.save(tmp_path / "a.gguf", adapters, NAMES)
    assert "blk.0.attn_v.weight: llama.cpp has no DoRA; merge the adapters" in str(caught.value)
    assert "blk.0.norm.weight: is fully trained, but a GGUF adapter" in str(caught.value)
    assert not (tmp_path / "a.gguf").exists()


def test_a_tied_embedding_is_refused(tmp_path):
    """llama.cpp 0.3.36 ends with an assertion there: its head is the same tensor."""
    names = gguf.Names("qwen2", NAMES.naming, tied=True)
    adapters = {"tokens": node("io", (6, 1), (1, 4))}
    gguf.save(tmp_path / "a.gguf", adapters, NAMES)
    with pytest.raises(lora_jax.StructureError, match=r"token_embd.weight: the head is tied to it"):
        gguf.save(tmp_path / "b.gguf", adapters, names)


def test_other_files_are_refused(tmp_path):
    gguf.save(tmp_path / "a.gguf", made(), NAMES)
    other = gguf.Names("llama", NAMES.naming)
    with pytest.raises(
        lora_jax.AdapterFileError, match="an adapter of the architecture 'qwen3moe'"
    ):
        gguf.load(tmp_path / "a.gguf", BASE, other)
    with pytest.raises(lora_jax.AdapterFileError, match=r"attn_v.weight: not in this base"):
        gguf.load(tmp_path / "a.gguf", {"up_0": BASE["up_0"]}, NAMES)
    wide = BASE | {"value_0": jax.ShapeDtypeStruct((4, 6), "float32")}
    with pytest.raises(lora_jax.AdapterFileError, match=r"\(5, 4\), but the model's is \(6, 4\)"):
        gguf.load(tmp_path / "a.gguf", wide, NAMES)
    tiny_model.write(tmp_path / "model.gguf", "llama")
    with pytest.raises(lora_jax.AdapterFileError, match="a GGUF model, not an adapter"):
        gguf.load(tmp_path / "model.gguf", BASE, NAMES)
