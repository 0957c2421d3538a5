"""Record what a tiny random Whisper of `transformers` says with timestamps, in recordings of any
length: tests/models/fixtures/whisper_timestamps.

Run it in an environment with PyTorch, peft and transformers (recorded with 2.13, 0.21.2 and 5.24):
`python -m tests.models.speech.record_timestamps`. The directory contains what `save_pretrained`
writes, with generation_config.json, and `expected.npz`: `features` of a recording longer than three
windows with the mel bins last, the parts that transformers finds in it (`times`, in seconds, and
`tokens`, -1 behind their ends), and what WhisperTimeStampLogitsProcessor makes of `scores` behind
each of `said`, -1 in front of them.
"""

import shutil

import numpy as np
import torch
import transformers
from transformers.generation.logits_process import WhisperTimeStampLogitsProcessor

from tests.models.encoder.record_encoders import FIXTURES, randomized

END, FIRST, VOCABULARY = 20, 27, 38
CONFIG = transformers.WhisperConfig(
    vocab_size=VOCABULARY,
    num_mel_bins=6,
    d_model=16,
    encoder_layers=1,
    encoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_layers=1,
    decoder_attention_heads=4,
    decoder_ffn_dim=24,
    max_source_positions=10,
    max_target_positions=32,
    init_std=0.5,
    pad_token_id=END,
    bos_token_id=END,
    eos_token_id=END,
    decoder_start_token_id=21,
    begin_suppress_tokens=None,
)
GENERATION = {
    "no_timestamps_token_id": FIRST - 1,
    "lang_to_id": {"<|en|>": 22, "<|de|>": 25},
    "task_to_id": {"transcribe": 23, "translate": 24},
    "is_multilingual": True,
    "max_initial_timestamp_index": 3,
    "suppress_tokens": [2, 3],
    "begin_suppress_tokens": [5],
}
#: Tokens of transcripts: none, one timestamp, a text, a pair, an end, and times that go on.
SAID = [[], [28], [28, 4], [28, 4, 30], [28, 4, 30, 30], [27, 4, 29, 29, 7], [4, 5], [28, 4, 33]]


def main() -> None:
    torch.manual_seed(3)
    model = randomized(transformers.WhisperForConditionalGeneration(CONFIG))
    for name, value in GENERATION.items():
        setattr(model.generation_config, name, value)
    directory = FIXTURES / "whisper_timestamps"
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    features = 1.5 * torch.randn(1, 6, 67)
    options = {"language": "de", "return_timestamps": True, "return_segments": True}
    with torch.no_grad():
        found = model.generate(features, max_new_tokens=18, **options)["segments"][0]
    tokens = np.full((len(found), max(len(x["tokens"]) for x in found)), -1)
    for row, part in zip(tokens, found, strict=True):
        row[: len(part["tokens"])] = part["tokens"]
    times = [(float(part["start"]), float(part["end"])) for part in found]
    longest, rules = max(map(len, SAID)), []
    scores = 2 * torch.randn(len(SAID), VOCABULARY)
    for i, said in enumerate(SAID):
        process = WhisperTimeStampLogitsProcessor(model.generation_config, begin_index=3)
        rules.append(process(torch.tensor([[21, 22, 23, *said]]), scores[i : i + 1])[0].numpy())
    np.savez_compressed(
        directory / "expected.npz",
        features=features[0].T,
        tokens=tokens,
        times=np.array(times),
        said=np.array([[-1] * (longest - len(x)) + x for x in SAID]),
        scores=scores,
        ruled=np.stack(rules),
    )


if __name__ == "__main__":
    main()
