"""`until_text` on every way to cut a text into pieces, against a search in the whole text."""

import itertools

import pytest

from lora_jax.models.text.stop_text import until_text

TEXT = "abcabdab"


def expected(text, stops):
    """Return the text before the first stop that is complete, by looking at every beginning."""
    for end in range(len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@pytest.mark.parametrize(
    "stops",
    [["abd"], ["cab", "abd"], ["bca", "abcabdabx"], ["x"], ["b", "ab"], ["dabc", "dab"], ["a"], []],
)
def test_the_pieces_do_not_matter(stops):
    for cuts in itertools.product([0, 1], repeat=len(TEXT) - 1):
        places = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(TEXT)]
        pieces = [TEXT[a:b] for a, b in itertools.pairwise(places)]
        assert "".join(until_text(pieces, stops)) == expected(TEXT, stops), pieces


def test_text_that_cannot_begin_a_stop_is_given_out_at_once():
    asked = []

    def pieces():
        for piece in ("abc", "de", "f"):
            asked.append(piece)
            yield piece

    found = until_text(pieces(), ["cd"])
    assert next(found) == "ab" and asked == ["abc"]
    assert list(found) == [] and asked == ["abc", "de"]  # the rest is not asked for


def test_an_empty_stop_is_refused():
    with pytest.raises(ValueError, match="must not be empty"):
        next(until_text(["a"], ["a", ""]))
