"""Models of images, and of images and texts."""

from typing import Any

import numpy as np
import torch
import transformers

from lora_jax import models
from tests.stress.model_configs.case import Arrays, Case, run
from tests.stress.model_configs.draw import ACTIVATIONS, Draw, randomized

_LAYERS = {
    "hidden_size": (16, 24),
    "intermediate_size": (24, 7),
    "num_attention_heads": (2, 4, 1),
    "num_hidden_layers": (2, 1, 3),
}
_IMAGE = {"num_channels": (3, 1, 4), "image_size": (12, 13, 8), "patch_size": (4, 3, 5)}
#: Of ViT and DeiT; transformers cannot compute SigLIP and CLIP with them.
_PAIRS = {"image_size": (12, 13, [12, 8], [9, 14]), "patch_size": (4, 3, [4, 2])}


def vit(draw: Draw) -> Case:
    """Return a random ViT, perhaps with a classifier or a pooler."""
    return _of_vit(draw, "ViT", ("ForImageClassification", "Model", "ForMaskedImageModeling"))


def deit(draw: Draw) -> Case:
    """Return a random DeiT, perhaps with a classifier, two of them, or a pooler."""
    heads = ("ForImageClassification", "ForImageClassificationWithTeacher", "Model")
    return _of_vit(draw, "DeiT", heads)


def _of_vit(draw: Draw, stem: str, heads: tuple[str, ...]) -> Case:
    head = draw.random.choice(heads)
    fields = draw.fields(
        {
            **_LAYERS,
            **_IMAGE,
            **_PAIRS,
            "hidden_act": ("gelu", *ACTIVATIONS),
            "layer_norm_eps": (1e-12, 1e-5, 0.1),
            "qkv_bias": (True, False),
            "pooler_act": ("tanh", "relu", "gelu"),
            "pooler_output_size": (None, 8),
        }
    )
    if "Classification" in head:
        fields["num_labels"] = draw.field("num_labels", 3, 1, 2, 5)
        fields["problem_type"] = draw.field("problem_type", None, "regression")
    if head == "ForMaskedImageModeling":
        fields["encoder_stride"] = 4
    return _case(draw, f"{stem}{head}", getattr(transformers, f"{stem}Config")(**fields))


def siglip_vision(draw: Draw) -> Case:
    """Return a random encoder of images of SigLIP."""
    fields = _tower(draw, 1e-6)
    fields["vision_use_head"] = draw.field("vision_use_head", True, False)
    return _case(draw, "SiglipVisionModel", transformers.SiglipVisionConfig(**fields))


def clip_vision(draw: Draw) -> Case:
    """Return a random encoder of images of CLIP."""
    head = draw.field("architectures", "", "WithProjection", share=0.2)
    config = transformers.CLIPVisionConfig(**_tower(draw, 1e-5), projection_dim=12)
    return _case(draw, f"CLIPVisionModel{head}", config)


def siglip(draw: Draw) -> Case:
    """Return both random encoders of SigLIP, or a classifier."""
    vision = _tower(draw, 1e-6)
    text = _text(draw, 1e-6) | {"projection_size": vision["hidden_size"]}
    config = transformers.SiglipConfig(vision_config=vision, text_config=text, num_labels=3)
    head = draw.field("SiglipForImageClassification", "Model", "ForImageClassification", share=0.2)
    return _case(draw, f"Siglip{head}", config, vision=vision, text=text)


def clip(draw: Draw) -> Case:
    """Return both random encoders of CLIP, or a classifier."""
    vision, text = _tower(draw, 1e-5), _text(draw, 1e-5)
    text["eos_token_id"] = draw.field("eos_token_id", 2, 7)
    size = draw.field("projection_dim", 12, 16)
    config = transformers.CLIPConfig(
        vision_config=vision, text_config=text, projection_dim=size, num_labels=3
    )
    head = draw.field("CLIPForImageClassification", "Model", "ForImageClassification", share=0.2)
    return _case(draw, f"CLIP{head}", config, vision=vision, text=text)


def _tower(draw: Draw, epsilon: float) -> dict[str, Any]:
    return draw.fields(
        {
            **_LAYERS,
            **_IMAGE,
            "hidden_act": ("gelu_pytorch_tanh", "quick_gelu", *ACTIVATIONS),
            "layer_norm_eps": (epsilon, 1e-12, 0.1),
        }
    )


def _text(draw: Draw, epsilon: float) -> dict[str, Any]:
    return draw.fields(
        {
            **_LAYERS,
            "vocab_size": (24, 31),
            "max_position_embeddings": (6, 9),
            "hidden_act": ("gelu_pytorch_tanh", "quick_gelu", *ACTIVATIONS),
            "layer_norm_eps": (epsilon, 1e-12, 0.1),
        }
    ) | {"bos_token_id": 1, "eos_token_id": 2}


def _case(
    draw: Draw,
    architecture: str,
    config: Any,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
) -> Case:
    made = getattr(transformers, architecture)
    model = randomized(made._from_config(config, attn_implementation="eager"), 0)
    draw.changed["architectures"] = architecture
    image = vision or config.to_dict()
    size = image["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    pixels = draw.arrays.standard_normal((2, height, width, image["num_channels"]))
    inputs: dict[str, np.ndarray] = {"pixels": pixels.astype(np.float32)}
    if text is not None and architecture.endswith("Model"):
        longest = text["max_position_embeddings"]
        length = longest if draw.random.random() < 0.5 else draw.random.randrange(2, longest + 1)
        ids = draw.arrays.integers(3, text["vocab_size"], (3, length))
        eos = 2 if text["eos_token_id"] == 2 else 7
        ids[ids == eos] = 3
        ids[np.arange(3), draw.arrays.integers(1, length, 3)] = (
            text["vocab_size"] - 1 if eos == 2 else eos
        )
        inputs["ids"] = ids.astype(np.int32)
    return Case(model, inputs, _theirs, _ours, draw)


def _theirs(model: Any, inputs: Arrays) -> Arrays:
    given = {"pixel_values": torch.from_numpy(inputs["pixels"]).permute(0, 3, 1, 2)}
    if "ids" in inputs:
        given["input_ids"] = torch.from_numpy(inputs["ids"].astype(np.int64))
        found = model(**given)
        both = {"images": found.image_embeds, "texts": found.text_embeds}
        return {k: x.numpy() for k, x in {"y": found.logits_per_image, **both}.items()}
    if "Classification" in type(model).__name__:
        return {"y": model(**given).logits.numpy()}
    base = getattr(model, model.base_model_prefix, model)
    if type(model).__name__.endswith("WithProjection"):
        return {"pooled": model(**given).image_embeds.numpy()}
    found = base(**given)
    pooled = {} if found.pooler_output is None else {"pooled": found.pooler_output}
    return {k: x.numpy() for k, x in {"y": found.last_hidden_state, **pooled}.items()}


def _ours(model: models.Pretrained, inputs: Arrays) -> Arrays:
    pixels = inputs["pixels"]
    found: dict[str, Any] = {"y": run(model.apply, model.params, *inputs.values())}
    if "ids" in inputs:
        part = lambda method, x: run(
            lambda params, x: model.apply(params, x, method=method), model.params, x
        )
        return found | {"images": part("images", pixels), "texts": part("texts", inputs["ids"])}
    if "Classification" not in model.settings["architectures"][0]:
        pooled = lambda params, x: model.apply(params, x, method="pooled")
        found["pooled"] = run(pooled, model.params, pixels)
    return found
