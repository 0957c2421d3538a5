"""Record what transformers makes of logits before it draws a token: sampling.npz.

python tests/parity/transformers/record_sampling.py    in an environment with transformers 5.24.0

The bias, the repetition penalty, the temperature, top_k,
top_p and min_p are its processors, in the order of its `generate`. It has none for the presence and
frequency penalties: those are computed here by OpenAI's formula, between the repetition penalty and
the temperature.
"""

import pathlib

import numpy as np
import torch
import transformers
from transformers.generation import logits_process as processors

OUT = pathlib.Path(__file__).parent / "sampling.npz"
VOCABULARY, PROMPT, MADE = 40, 6, 9
# temperature, top_k, top_p, min_p, repetition, presence, frequency, biased tokens
CASES = (
    (1.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0),
    (0.7, 5, 1.0, 0.0, 1.0, 0.0, 0.0, 0),
    (1.3, 0, 0.6, 0.0, 1.0, 0.0, 0.0, 0),
    (1.0, 0, 1.0, 0.1, 1.0, 0.0, 0.0, 0),
    (1.0, 0, 1.0, 0.0, 1.8, 0.0, 0.0, 0),
    (1.0, 0, 1.0, 0.0, 0.6, 0.0, 0.0, 0),
    (1.0, 0, 1.0, 0.0, 1.0, 1.5, 0.0, 0),
    (1.0, 0, 1.0, 0.0, 1.0, 0.0, -0.8, 0),
    (1.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 3),
    (0.8, 12, 0.9, 0.02, 1.3, 0.4, 0.7, 4),
    (2.0, 1, 0.5, 0.5, 1.1, -2.0, 2.0, 40),
    (0.9, 30, 0.95, 0.1, 0.9, 0.5, 0.1, 1),
)


def expected(
    logits: np.ndarray, prompt: np.ndarray, made: np.ndarray, case, bias: dict
) -> np.ndarray:
    temperature, top_k, top_p, min_p, repetition, presence, frequency, _ = case
    ids = torch.tensor(np.concatenate([prompt, made]))[None]
    scores = torch.tensor(logits)[None]
    if bias:
        given = {(int(token),): float(value) for token, value in bias.items()}
        scores = processors.SequenceBiasLogitsProcessor(given)(ids, scores)
    scores = processors.RepetitionPenaltyLogitsProcessor(repetition)(ids, scores)
    for token in range(VOCABULARY):
        count = int((made == token).sum())
        scores[0, token] -= frequency * count + (presence if count else 0)
    warpers = [processors.TemperatureLogitsWarper(temperature)]
    warpers += [processors.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [processors.TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [processors.MinPLogitsWarper(min_p)] if min_p else []
    for warper in warpers:
        scores = warper(ids, scores)
    return scores[0].numpy()


def main() -> None:
    rng = np.random.default_rng(0)
    count = len(CASES)
    logits = (1.5 * rng.normal(size=(count, VOCABULARY))).astype(np.float32)
    prompts, made = (
        rng.integers(0, VOCABULARY, (count, n)).astype(np.int32) for n in (PROMPT, MADE)
    )
    made[:, 1::3] = made[:, ::3]  # some more than once
    bias = np.zeros((count, VOCABULARY), np.float32)
    for row, case in enumerate(CASES):
        chosen = rng.permutation(VOCABULARY)[: case[-1]]
        bias[row, chosen] = rng.uniform(-4, 4, len(chosen))
    scores = [
        expected(
            logits[n], prompts[n], made[n], case, {i: bias[n, i] for i in np.flatnonzero(bias[n])}
        )
        for n, case in enumerate(CASES)
    ]
    arrays = {"logits": logits, "prompts": prompts, "made": made, "bias": bias}
    np.savez_compressed(
        OUT,
        **arrays,
        cases=np.array([case[:-1] for case in CASES]),
        scores=np.stack(scores),
        transformers=transformers.__version__,
    )


if __name__ == "__main__":
    main()
