"""The card beside a PEFT adapter: its front matter is what huggingface_hub 2.4.0 read, and what a
person has written stays."""

import json
import pathlib

import numpy as np
import pytest

from lora_jax import peft
from lora_jax.core.layout import Layout
from lora_jax.core.weights import LoraWeight
from lora_jax.files.naming import Entry, Naming

FOLDER = pathlib.Path(__file__).parent
NAMING = Naming((Entry("{*m}.weight", "{*m}/kernel", "linear"),))
CARD = peft.ModelCard(
    license="apache-2.0",
    datasets=["me/rows"],
    language=["en"],
    tags=["plays: of Shakespeare"],
    data="10 rows | of <play>",
    figures={"steps": 20, "held-out loss": 2.345678},
)


def write(folder, base_model="me/model", **options):
    factors = np.ones((4, 2), "f4"), np.ones((2, 3), "f4"), np.float32(2)
    adapters = {"up": {"kernel": LoraWeight(None, *factors, layout=Layout("io"))}}
    peft.save(folder, adapters, NAMING, base_model=base_model, task_type="CAUSAL_LM", **options)
    return folder / "README.md"


def test_what_the_hub_reads(tmp_path):
    assert write(tmp_path / "a", card=CARD).read_text() == (FOLDER / "card.md").read_text()
    read = json.loads((FOLDER / "card.json").read_text())
    assert read == {
        "base_model": "me/model",
        "datasets": ["me/rows"],
        "language": ["en"],
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lora_jax", "base_model:adapter:me/model", "plays: of Shakespeare"],
    }


def test_a_card_follows_the_files_until_somebody_changes_it(tmp_path):
    folder = tmp_path / "adapter"
    card = write(folder)
    first = card.read_text()
    assert write(folder, card=CARD).read_text() != first  # ours, and nobody changed it
    card.write_text(card.read_text().replace("Use", "How I use it"))
    mine = card.read_text()
    assert write(folder).read_text() == mine and not peft.may_replace_card(folder)
    card.write_text("# mine\n")
    assert write(folder, card=CARD).read_text() == "# mine\n"
    card.unlink()
    assert write(folder).read_text() == first and peft.may_replace_card(folder)


@pytest.mark.parametrize("base", [None, "/models/mine", "a b", "me/mo\ndel"])
def test_names_that_the_hub_refuses_are_left_out_of_the_front_matter(base, tmp_path):
    front = write(tmp_path / "a", base).read_text().split("---\n")[1]
    assert "base_model" not in front and 'library_name: "peft"' in front


def test_no_card(tmp_path):
    assert not write(tmp_path / "a", card=None).exists()
