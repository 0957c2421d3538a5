"""The table of `python -m benchmarks.model_parity`: its rows, and the page that shows them."""

import pathlib

import pytest

from benchmarks import model_parity
from lora_jax.models.families import FAMILIES
from tests.models.recorded import NEWER

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "models.md"


def test_the_page_has_every_recorded_decoder():
    page = PAGE.read_text()
    assert set(NEWER) <= set(model_parity.names())
    for name in model_parity.names():
        assert f"| {name} " in page
    for name, family in FAMILIES.items():
        if family.kind == "decoder":
            assert f"`{name}`" in page


@pytest.mark.slow
def test_a_row_says_what_was_measured(quick_compile):
    name, version, logits, *words = model_parity.row("gemma2", with_peft=False)
    assert (name, version) == ("gemma2", "5.24.0")
    assert float(logits) < 1e-4
    assert words == ["equal", "equal", "", "", ""]
