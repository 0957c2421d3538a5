"""Record tiny random models of images of `transformers`: tests/models/fixtures.

Run it in an environment with PyTorch, peft and transformers (recorded with 2.13, 0.21.2 and 5.24):
`python -m tests.models.vision.record_vision [deit ...]`. Every directory contains what
`save_pretrained` writes, and `expected.npz`: `pixels` with the channels last, the outputs, two
files of an adapter of peft, as bytes, and the outputs with it; `ids` of SigLIP and CLIP, and of ViT
`images` and what its processor makes of them.
"""

import shutil
import sys

import numpy as np
import peft
import torch
import transformers

from tests.models.encoder.record_encoders import FIXTURES, adapter_files, randomized
from tests.parity.peft.recorded.record_files import move

TWO_TOWERS = ("siglip", "clip")
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
WIDE = {"image_size": [12, 8], "patch_size": [4, 2]}
IMAGE = {**SIZES, "image_size": 12, "patch_size": 4}
TEXT = {**SIZES, "vocab_size": 24, "max_position_embeddings": 6, "bos_token_id": 1}
TEXT |= {"eos_token_id": 2, "projection_size": 16}
c = transformers
torch.manual_seed(0)
MODELS = {
    "vit": c.ViTForImageClassification(
        c.ViTConfig(**IMAGE, num_labels=3, initializer_range=0.25),
    ),
    "siglip_vision": c.SiglipVisionModel(c.SiglipVisionConfig(**IMAGE)),
    "siglip": c.SiglipModel(
        c.SiglipConfig(
            vision_config={**IMAGE, "num_hidden_layers": 1},
            text_config={**TEXT, "num_hidden_layers": 1},
        )
    ),
    "clip_vision": c.CLIPVisionModel(c.CLIPVisionConfig(**IMAGE, initializer_factor=2.0)),
    # neither images nor patches are square
    "deit": c.DeiTForImageClassificationWithTeacher(
        c.DeiTConfig(**{**IMAGE, **WIDE}, num_labels=3, initializer_range=0.25)
    ),
    "vit_pooled": c.ViTModel(
        c.ViTConfig(
            **IMAGE,
            hidden_act="silu",
            pooler_act="gelu",
            pooler_output_size=5,
            initializer_range=0.25,
        )
    ),
    "clip": c.CLIPModel(
        c.CLIPConfig(
            vision_config={**IMAGE, "num_hidden_layers": 1},
            text_config={**TEXT, "num_hidden_layers": 1},
            projection_dim=12,
        )
    ),
}
PEFTS = {
    "vit": {
        "target_modules": [*(f"{x}_proj" for x in "qkvo"), "fc1", "fc2", "projection"],
        "modules_to_save": ["classifier"],
    },
    "siglip_vision": {"target_modules": ["q_proj", "v_proj", "patch_embedding"]},
    "siglip": {"target_modules": ["q_proj", "fc2", "token_embedding"]},
    "clip_vision": {"target_modules": ["out_proj", "patch_embedding"]},
    "deit": {"target_modules": ["q_proj", "fc1", "projection"]},
    "vit_pooled": {"target_modules": ["q_proj", "dense"]},
    "clip": {"target_modules": ["v_proj", "fc2", "visual_projection", "text_projection"]},
}


def outputs(name: str, model: torch.nn.Module, pixels: torch.Tensor, ids: torch.Tensor) -> dict:
    given = {"pixel_values": pixels} | ({"input_ids": ids} if name in TWO_TOWERS else {})
    with torch.no_grad():
        found = model(**given)
    if name in ("vit", "deit"):
        return {"y": found.logits}
    if name in TWO_TOWERS:
        return {"y": found.logits_per_image, "images": found.image_embeds}
    return {"y": found.last_hidden_state, "pooled": found.pooler_output}


def record(name: str, model: torch.nn.Module) -> None:
    torch.manual_seed(1)
    directory = FIXTURES / name
    shutil.rmtree(directory, ignore_errors=True)
    randomized(model).save_pretrained(directory)
    width = 8 if name == "deit" else 12
    pixels, ids = torch.randn(2, 3, 12, width), torch.randint(3, 24, (3, 6))
    arrays = {"pixels": pixels.permute(0, 2, 3, 1), "ids": ids}
    arrays |= outputs(name, model, pixels, ids)
    config = peft.LoraConfig(r=2, lora_alpha=3, **PEFTS[name])
    adapted = move(peft.get_peft_model(model, config)).eval()
    changed = outputs(name, adapted, pixels, ids)
    arrays |= {f"adapted_{key}": x for key, x in changed.items()}
    if name == "vit":
        processor = c.ViTImageProcessorPil(
            size={"height": 12, "width": 12},
            image_mean=[0.48, 0.45, 0.4],
            image_std=[0.26, 0.27, 0.28],
        )
        processor.save_pretrained(directory)
        images = np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3), np.uint8)
        made = processor(list(images), return_tensors="pt")["pixel_values"]
        arrays |= {"images": images, "processed": made.permute(0, 2, 3, 1)}
    np.savez_compressed(directory / "expected.npz", **arrays, **adapter_files(adapted))


if __name__ == "__main__":
    torch.manual_seed(0)
    for name, model in MODELS.items():
        if name in (sys.argv[1:] or MODELS):
            record(name, model)
