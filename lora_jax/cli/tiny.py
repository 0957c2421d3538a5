"""The model "tiny": random, with a token for every byte, written where fetched models are."""

from pathlib import Path

from lora_jax import assets, models, tensorfile
from lora_jax.models.tiny import tiny
from lora_jax.text.letters import byte_tokenizer

NAME = "tiny"
VERSION = 1  # of its numbers: adapters are for these


def directory() -> Path:
    """A directory in Hugging Face's layout, made where it is not there yet."""
    path = assets.cache_directory() / f"{NAME}-{VERSION}"
    if not (path / "model.safetensors").exists() or not (path / "config.json").exists():
        tokenizer = byte_tokenizer()
        tensorfile.write_directory(path, tokenizer.files())
        models.save(path, tiny(len(tokenizer)))
    return path
