"""Record the frequencies of transformers' rotations: tests/models/fixtures/rope.json.

Run it in an environment with PyTorch and transformers (recorded with 2.13 and 5.24):
`python tests/models/record_rope.py`. A list of `{"settings": config.json's part, "length": of a
call, "frequencies": one per pair, "factor": of cosine and sine}`.
"""

import copy
import json
import pathlib

import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 8}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 0.7 * i for i in range(8)],
}
PARTIAL = {name: x[:6] if isinstance(x, list) else x for name, x in LONG.items()}
YARN = {"rope_type": "yarn", "factor": 4.0}
#: max_position_embeddings, the original length, the length of a call, the parameters.
CASES = (
    (256, None, 7, {"rope_type": "linear", "factor": 3.0}),
    (256, None, 200, {"rope_type": "dynamic", "factor": 3.0}),
    (256, None, 7, {**YARN, "original_max_position_embeddings": 64}),
    (256, None, 7, {**YARN, "rope_theta": 30.0, "beta_fast": 8.0, "beta_slow": 0.5}),
    (256, None, 7, {**YARN, "truncate": False, "original_max_position_embeddings": 100}),
    (256, None, 7, {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}),
    (256, None, 7, {**YARN, "attention_factor": 0.9}),
    (256, 64, 7, LONG),
    (256, 64, 65, LONG),
    (256, 64, 65, {**LONG, "factor": 8.0}),
    (256, 64, 64, {**PARTIAL, "partial_rotary_factor": 0.75, "rope_theta": 500.0}),
    (64, 64, 64, {**LONG, "attention_factor": 1.3}),
    (
        *(256, None, 7),
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 64},
    ),
    (256, None, 7, {"rope_type": "proportional", "partial_rotary_factor": 0.4, "factor": 2.0}),
)


def main() -> None:
    found = []
    for longest, original, length, parameters in CASES:
        settings = {**SIZES, "max_position_embeddings": longest}
        extra = {} if original is None else {"original_max_position_embeddings": original}
        kind = transformers.Phi3Config if original is not None else transformers.LlamaConfig
        config = kind(**settings, **extra, rope_parameters=copy.deepcopy(parameters))
        compute = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
        frequencies, factor = compute(config, "cpu", seq_len=length)
        settings |= extra | {"rope_parameters": parameters}
        found.append(
            {
                "settings": settings,
                "length": length,
                "frequencies": [float(x) for x in frequencies],
                "factor": factor,
            }
        )
    path = pathlib.Path(__file__).parent / "fixtures" / "rope.json"
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
