"""Record a tiny random Whisper of `transformers`: tests/models/fixtures/whisper.

Run it in an environment with PyTorch, peft and transformers (recorded with 2.13, 0.21.2 and 5.24):
`python -m tests.models.speech.record_speech`. The directory contains what `save_pretrained` writes,
and `expected.npz`: features with the mel bins last, token ids and logits; greedy tokens after the
first two ids, plain and with suppressed tokens; the two files of an adapter of peft, as bytes, the
logits and tokens with it; and a recording with its features.
"""

import shutil

import numpy as np
import peft
import torch
import transformers
from transformers.generation import GenerationMixin

from tests.models.encoder.record_encoders import FIXTURES, adapter_files, randomized
from tests.parity.peft.recorded.record_files import move

CONFIG = transformers.WhisperConfig(
    vocab_size=40,
    num_mel_bins=6,
    d_model=16,
    encoder_layers=1,
    encoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_layers=2,
    decoder_attention_heads=4,
    decoder_ffn_dim=24,
    max_source_positions=10,
    max_target_positions=16,
    init_std=0.3,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=None,
    decoder_start_token_id=1,
    begin_suppress_tokens=None,
)


def greedy(model: torch.nn.Module, features: torch.Tensor, ids: torch.Tensor, **options) -> dict:
    """Return what transformers' ordinary loop generates, not Whisper's own of long recordings."""
    found = GenerationMixin.generate(
        model, features, decoder_input_ids=ids, max_new_tokens=9, do_sample=False, **options
    )
    return found[:, ids.shape[1] :]


def main() -> None:
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(CONFIG)
    model = randomized(model)
    directory = FIXTURES / "whisper"
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink()
    features, ids = torch.randn(2, 6, 20), torch.randint(2, 40, (2, 7))
    arrays = {"features": features.transpose(1, 2), "ids": ids}
    with torch.no_grad():
        arrays["logits"] = model(input_features=features, decoder_input_ids=ids).logits
        arrays["greedy"] = greedy(model, features, ids[:, :2])
        never, not_first = arrays["greedy"][1, 1:2].tolist(), arrays["greedy"][:, 0].tolist()
        options = {"suppress_tokens": never, "begin_suppress_tokens": not_first}
        arrays["suppressed"] = greedy(model, features, ids[:, :2], **options)
        arrays |= {"suppress": np.array(never), "begin_suppress": np.array(not_first)}
        config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj", "fc1"])
        adapted = move(peft.get_peft_model(model, config)).eval()
        arrays["adapted"] = adapted(input_features=features, decoder_input_ids=ids).logits
        arrays["adapted_greedy"] = greedy(adapted.base_model.model, features, ids[:, :2])
    extractor = transformers.WhisperFeatureExtractor(feature_size=20, chunk_length=1)
    times = np.arange(12_000) / 16_000
    sound = (0.4 * np.sin(6000 * times**2) + 0.05 * np.sin(40_000 * times)).astype(np.float32)
    padded = np.pad(sound, (0, 4_000)).astype(np.float64)
    heard = extractor._np_extract_fbank_features(padded[None], "cpu")  # without PyTorch's float32
    arrays["mel"] = heard[0].T[::9]
    np.savez_compressed(directory / "expected.npz", **arrays, **adapter_files(adapted))


if __name__ == "__main__":
    main()
