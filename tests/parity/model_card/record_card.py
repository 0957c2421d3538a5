"""Record what huggingface_hub 2.4.0 reads in `card.md`, a card of lora_jax: `card.json`.

    python -m tests.parity.model_card.record_card

`card.md` is what test_card.py's `text` returns; the test compares it with the file.
"""

import json
import pathlib

from huggingface_hub import ModelCard

FOLDER = pathlib.Path(__file__).parent

if __name__ == "__main__":
    card = ModelCard.load(FOLDER / "card.md")
    (FOLDER / "card.json").write_text(json.dumps(card.data.to_dict(), indent=1) + "\n")
