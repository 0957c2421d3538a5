"""Record tiny random encoders of texts of `transformers`: tests/models/fixtures.

Run it in an environment with PyTorch, peft and transformers (recorded with 2.13, 0.21.2 and 5.24):
`python -m tests.models.encoder.record_encoders`. Every directory contains what `save_pretrained`
writes, and `expected.npz`: token ids and mask (one row padded on the right), hidden states in
float32, the two files of an adapter of peft, as bytes, and the hidden states with it.
"""

import pathlib
import shutil
import tempfile

import numpy as np
import peft
import torch
import transformers

from tests.parity.peft.recorded.record_files import move

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "initializer_range": 0.25,
}
MODELS = {
    "roberta": transformers.RobertaConfig(
        **SIZES, num_hidden_layers=2, max_position_embeddings=34, type_vocab_size=1, pad_token_id=1
    ),
    # three layers see 3 tokens to each side, between two that see all
    "modernbert": transformers.ModernBertConfig(
        **SIZES,
        num_hidden_layers=4,
        max_position_embeddings=64,
        local_attention=6,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        cls_token_id=2,
        sep_token_id=3,
    ),
}
TARGETS = {
    "roberta": ["query", "value", "intermediate.dense"],
    "modernbert": ["Wqkv", "Wi", "mlp.Wo"],
}


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Return a model with random values also in its biases and norms."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def adapter_files(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Return the two files that peft writes, as bytes by name."""
    with tempfile.TemporaryDirectory() as folder:
        model.peft_config["default"].base_model_name_or_path = "tiny"
        model.save_pretrained(folder, save_embedding_layers=False)
        return {
            name: np.frombuffer((pathlib.Path(folder) / name).read_bytes(), np.uint8)
            for name in ("adapter_model.safetensors", "adapter_config.json")
        }


def record(name: str, config: transformers.PretrainedConfig) -> None:
    torch.manual_seed(0)
    model = randomized(transformers.AutoModel.from_config(config, attn_implementation="eager"))
    directory = FIXTURES / name
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    ids = torch.randint(4, 64, (2, 11))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    ids[1, 7:] = config.pad_token_id
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    wanted = peft.LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS[name])
    adapted = move(peft.get_peft_model(model, wanted)).eval()
    with torch.no_grad():
        changed = adapted(**inputs).last_hidden_state
    arrays = {"ids": ids, "mask": mask, "hidden": hidden, "adapted": changed}
    np.savez_compressed(directory / "expected.npz", **arrays, **adapter_files(adapted))


if __name__ == "__main__":
    for name, config in MODELS.items():
        record(name, config)
