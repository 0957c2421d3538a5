"""Configurations of published models are accepted whole, and have as many parameters as published.

The numbers are those of transformers 5.24 for the class named in each config.json, without the
heads that are kept beside the model here: poolers, and the layers of masked language models.
"""

import math

import jax
import pytest

from lora_jax.models.families import family_of
from lora_jax.models.weights.family import Options
from tests.models.published_configs import CONFIGS

PARAMETERS = {
    "bert-base-uncased": 108_891_648,
    "roberta-base": 124_055_040,
    "xlm-roberta-base": 277_453_056,
    "ModernBERT-base": 149_014_272,
    "ModernBERT-large": 394_781_696,
    "vit-base-patch16-224": 86_567_656,
    "siglip-base-patch16-224": 203_155_970,
    "siglip-so400m-patch14-384": 877_960_498,
    "clip-vit-large-patch14": 427_616_513,
    "whisper-tiny": 37_760_640,
    "whisper-large-v3": 1_543_490_560,
    "whisper-large-v3-turbo": 808_878_080,
}
DEFAULT = ("ModernBERT-base", "clip-vit-large-patch14", "whisper-large-v3-turbo")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x in DEFAULT else pytest.mark.slow) for x in CONFIGS]
)
def test_parameters(name):
    settings = CONFIGS[name]
    family = family_of(settings)
    module = family.module(settings, Options(scan=True))
    made = jax.eval_shape(module.init, jax.random.key(0), **family.inputs(module))["params"]
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(made)) == PARAMETERS[name]
