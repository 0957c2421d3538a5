"""Models of images against transformers 5.24 and peft 0.21.2, as record_vision.py recorded."""

import functools
import json

import jax
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models, peft
from lora_jax.models.families import FAMILIES
from lora_jax.models.weights.family import Options
from tests.models import recorded
from tests.models.encoder.test_recorded import same_tensors, write_adapter

pytestmark = pytest.mark.usefixtures("quick_compile")
NAMES = ("vit", "siglip_vision", "siglip", "clip_vision", "deit", "vit_pooled", "clip")
TWO_TOWERS = ("siglip", "clip")
DEFAULT = ("deit", "siglip", "clip_vision")


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def function(name, model):
    """Return the outputs that were recorded, as one function of parameters and inputs."""
    run = model.apply
    if name in ("vit", "deit"):
        return lambda params, pixels: {"y": run(params, pixels)}
    if name in TWO_TOWERS:
        both = lambda params, *inputs: {
            "y": run(params, *inputs),
            "images": run(params, inputs[0], method="images"),
        }
        return both
    pooled = functools.partial(run, method="pooled")
    return lambda params, pixels: {"y": run(params, pixels), "pooled": pooled(params, pixels)}


def inputs(name):
    want = recorded.expected(name)
    return (want["pixels"], *([want["ids"]] if name in TWO_TOWERS else []))


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=() if x in DEFAULT else pytest.mark.slow) for x in NAMES],
)
def test_outputs_with_an_adapter_and_without(name, tmp_path):
    model, want = recorded.load(name), recorded.expected(name)
    adapters = peft.load(write_adapter(name, tmp_path), model.params, model.naming)
    params = lora.join(model.params, adapters)
    apply = jax.jit(lora.lora(function(name, model), on_dense="error"))
    for prefix, given in {"adapted_": params, "": lora.disable(params)}.items():
        for key, y in apply(given, *inputs(name)).items():
            np.testing.assert_allclose(y, want[prefix + key], atol=1.6e-5)


def test_files_written_are_those_read(name, tmp_path):
    model = recorded.load(name)
    models.save(tmp_path / "model", model)
    file = "model.safetensors"
    same_tensors(tmp_path / "model" / file, recorded.FIXTURES / name / file)
    source = write_adapter(name, tmp_path)
    adapters, config = peft.load(source, model.params, model.naming), peft.read_config(source)
    peft.save(tmp_path / "again", adapters, model.naming, base=model.params, config=config)
    same_tensors(tmp_path / "again" / peft.TENSORS, source / peft.TENSORS)


def test_an_adapter_with_the_names_of_transformers_4():
    """Files of models and adapters have the same names there; since 5 modules have others."""
    model = recorded.load("vit")
    old = ["base_model.model.vit.encoder.layer.0.attention.attention.query.lora_A.weight"]
    new = ["base_model.model.vit.layers.0.attention.q_proj.lora_A.weight"]
    assert models.naming("vit", new) == model.naming
    assert models.naming("vit", old) == model.in_files


def test_pixels_of_images():
    want = recorded.expected("vit")
    process = models.ImageProcessor.load(recorded.FIXTURES / "vit")
    np.testing.assert_allclose(process(want["images"]), want["processed"], atol=1e-6)
    with pytest.raises(lora.ConfigError, match=r"\[batch, 12, 12, 3\], got \(2, 6, 12, 3\)"):
        process(want["images"][:, :6])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": {"height": 12}}, "size must have height and width in pixels"),
        (
            {"image_mean": "none"},
            "image_mean must be a list of numbers from -1e.06 to 1e6, got 'none'",
        ),
        ({"image_std": [0.5, 0, 0.5]}, "image_std must be a list of numbers from 1e-06 to 1e6"),
        ({"image_mean": [0.5]}, "image_mean has 1 channels, but image_std has 3"),
        ({"rescale_factor": None}, "rescale_factor must be a positive number up to 1e6"),
    ],
)
def test_processors_that_are_refused(change, message, tmp_path):
    file = recorded.FIXTURES / "vit" / "preprocessor_config.json"
    settings = {**json.loads(file.read_text()), **change}
    (tmp_path / file.name).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json: .*{message}"):
        models.ImageProcessor.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vit", {"num_attention_heads": 3}, "hidden_size 16 is not a multiple of"),
        ("vit", {"patch_size": 24}, "image_size 12 is below patch_size 24"),
        ("vit", {"image_size": [12, 12, 3]}, "image_size must be a positive int or two"),
        ("vit", {"hidden_act": "prelu"}, "hidden_act 'prelu' is not one of"),
        ("vit", {"layer_norm_eps": 0}, "layer_norm_eps must be a positive number"),
        ("vit", {"qkv_bias": 1}, "qkv_bias must be true or false"),
        ("vit", {"pooler_act": "prelu"}, "pooler_act 'prelu' is not one of"),
        ("vit_pooled", {"pooler_output_size": -1}, "pooler_output_size must be a positive int"),
        ("clip", {"projection_dim": "x"}, "projection_dim must be a positive int, got 'x'"),
        ("clip", {"text_config_dict": {"eos_token_id": None}}, "eos_token_id must be an int"),
        ("clip", {"architectures": ["CLIPForImageClassification"]}, "is not supported, only CLIP"),
        ("siglip", {"vision_config": 3}, "vision_config and text_config must be objects"),
        ("siglip", {"architectures": ["SiglipForImageClassification"]}, "is not supported, only"),
    ],
)
def test_configurations_that_are_refused(name, change, message):
    settings = {**recorded.load(name).settings, "add_pooling_layer": True, **change}
    with pytest.raises(ValueError, match=message):
        FAMILIES[settings["model_type"]].module(settings, Options())


def test_what_a_model_refuses(name):
    model = recorded.load(name)
    ids = [jax.ShapeDtypeStruct((1, 6), "int32")] if name in TWO_TOWERS else []
    small = jax.ShapeDtypeStruct((1, 8, 12, 3), "float32")
    with pytest.raises(ValueError, match=r"must be \[batch, 12, \d+, 3\], got \(1, 8, 12, 3\)"):
        jax.eval_shape(model.apply, model.params, small, *ids)


@pytest.mark.parametrize("width", [1_000_000, 2**31 - 1])
def test_sizes_in_objects_of_the_configuration(width, tmp_path):
    for file in (recorded.FIXTURES / "siglip").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["vocab_size"] = width
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"text_config.vocab_size is {width}, but the files cont"):
        models.load(tmp_path)
