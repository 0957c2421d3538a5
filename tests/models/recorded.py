"""The models of `transformers` that record_models.py recorded."""

import functools
import pathlib

import numpy as np

from lora_jax import models

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
CAUSAL = ("llama", "llama_tied", "mistral", "qwen2")  # llama_tied is in three files
#: Families that need switches of the decoder.
NEWER = (
    *("qwen3", "gemma", "gemma2", "gemma3_text", "gemma3", "phi3", "smollm3", "olmo2", "granite"),
)
#: Families that are rows of the table, with switches of others.
ROWS = ("ministral", "seed_oss", "olmo3", "exaone4")
#: Families whose layers have experts.
EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss", "olmoe")
MIXED = "qwen3_moe_mixed"  # one of its four layers has experts
#: Models of texts, images and speech other than decoders.
OTHERS = (
    *("roberta", "modernbert", "vit", "siglip", "siglip_vision", "clip_vision", "whisper"),
    *("deit", "vit_pooled", "clip"),
)


@functools.cache
def load(name: str, **options) -> models.Pretrained:
    return models.load(FIXTURES / name, **options)


@functools.cache
def expected(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / name / "expected.npz") as file:
        return dict(file)
