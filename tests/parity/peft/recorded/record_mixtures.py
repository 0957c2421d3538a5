"""Record adapters of peft 0.21.2 on models with experts of tests/models/fixtures: test_mixtures.py.

    python -m tests.parity.peft.recorded.record_mixtures

writes `mixtures.npz`, of transformers 5.24, whose experts are parameters: `record_models` says what
is in it.
"""

import pathlib

from tests.parity.peft.recorded import record_models

EXPERTS = {
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "target_modules": ["q_proj"],
}
CASES = {"mixtral": EXPERTS, "gpt_oss": EXPERTS}

if __name__ == "__main__":
    record_models.main(CASES, pathlib.Path(__file__).parent / "mixtures.npz")
