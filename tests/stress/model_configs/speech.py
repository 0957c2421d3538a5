"""Whisper."""

import numpy as np
import torch
import transformers

from lora_jax import models
from tests.stress.model_configs.case import Arrays, Case, run
from tests.stress.model_configs.draw import ACTIVATIONS, Draw, randomized


def whisper(draw: Draw) -> Case:
    """Return a random Whisper with its output head, its model without one, or a classifier."""
    fields = draw.fields(
        {
            "vocab_size": (40, 37),
            "num_mel_bins": (6, 80, 128),
            "d_model": (16, 24),
            "encoder_layers": (1, 2, 3),
            "decoder_layers": (2, 1, 3),
            "encoder_attention_heads": (2, 4, 1),
            "decoder_attention_heads": (4, 2, 1),
            "encoder_ffn_dim": (24, 7),
            "decoder_ffn_dim": (20, 7),
            "max_source_positions": (10, 5),
            "max_target_positions": (16, 9),
            "activation_function": ("gelu", *ACTIVATIONS),
            "scale_embedding": (False, True),
            "tie_word_embeddings": (True, True, True, False),
        }
    )
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    config = transformers.WhisperConfig(**fields, **ids, decoder_start_token_id=1)
    head = draw.field(
        "architectures", "ForConditionalGeneration", "Model", "ForAudioClassification", share=0.2
    )
    made = getattr(transformers, f"Whisper{head}")
    model = randomized(made._from_config(config, attn_implementation="eager"), 0)
    arrays, frames = draw.arrays, 2 * fields["max_source_positions"]
    length = draw.random.randrange(1, fields["max_target_positions"] + 1)
    inputs = {
        "features": arrays.standard_normal((2, frames, fields["num_mel_bins"])).astype(np.float32),
        "ids": arrays.integers(2, 37, (2, length)).astype(np.int32),
    }
    return Case(model, inputs, _theirs, _ours, draw)


def _theirs(model: torch.nn.Module, inputs: Arrays) -> Arrays:
    features = torch.from_numpy(inputs["features"]).transpose(1, 2)
    ids = torch.from_numpy(inputs["ids"].astype(np.int64))
    name = type(model).__name__
    if name.endswith("Classification"):
        return {"y": model(input_features=features).logits.numpy()}
    found = model(input_features=features, decoder_input_ids=ids)
    if name == "WhisperModel":
        table = model.get_input_embeddings().weight
        return {"y": (found.last_hidden_state @ table.T).numpy()}
    return {"y": found.logits.numpy()}


def _ours(model: models.Pretrained, inputs: Arrays) -> Arrays:
    apply = lambda params, ids, features: model.apply(params, ids, features=features)
    return {"y": run(apply, model.params, inputs["ids"], inputs["features"])}
