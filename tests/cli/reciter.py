"""A Llama that recites: each token is followed by the next one of a given sequence."""

import itertools
import json

import numpy as np

from lora_jax.files.disk import safetensors_file
from tests.cli import files


def tensors(ids, vocabulary=260, seed=5):
    """Return weights under which `ids[i]` is followed by `ids[i + 1]`, all of them different.

    The layers add nothing, embeddings have one length, and the head's row of a token is the
    embedding of the one before it, so its logit is the largest.
    """
    rng = np.random.default_rng(seed)
    found = files.weights()
    embedding = rng.normal(size=(vocabulary, files.WIDTH))
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    head = np.zeros_like(embedding)
    for before, after in itertools.pairwise(ids):
        head[after] = embedding[before]
    for name, x in found.items():
        if "o_proj" in name or "down_proj" in name:
            x[:] = 0
        if "norm" in name:
            x[:] = 1
    found["model.embed_tokens.weight"] = embedding.astype(np.float32)
    found["lm_head.weight"] = head.astype(np.float32)
    return found


def model(directory, tokenizer, text, end=(), **settings):
    """Write a model that continues the first character of `text` with the rest, then `end`."""
    files.model(directory, **settings)
    ids = [*tokenizer.encode(text), *end]
    assert len(set(ids)) == len(ids)
    safetensors_file.write(directory / "model.safetensors", tensors(ids), {"format": "pt"})
    for name, data in tokenizer.files().items():
        (directory / name).write_bytes(data)
    return directory


def settings_file(directory, **settings):
    (directory / "generation_config.json").write_text(json.dumps(settings))
