"""Rows of preferences: the forms that they have, and the tokens that are compared."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.models.text.byte_tokenizer import byte_tokenizer
from lora_jax.training import DataError, preference
from lora_jax.training.dataset import Row, Rows, parse_row, read_rows
from tests.training import tiny_model

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOKENIZER = dataclasses.replace(byte_tokenizer(), chat_template=TEMPLATE)


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


TURN = "[user]Hi<|end|>[assistant]"
EARLIER = [user("Hi"), says("A"), user("So")]
WHOLE = f"{TURN}A<|end|>[user]So<|end|>[assistant]"
HUMAN = "\n\nHuman: Hi\n\nAssistant:"
#: A form -> a row of it, the prompt, and the two completions.
FORMS = {
    "strings": (("Q", " Yes", " No"), "Q", (" Yes", " No")),
    "messages": (([user("Hi")], [says("Yes")], [says("No")]), TURN, ("Yes", "No")),
    "repeated": (
        ([user("Hi")], [user("Hi"), says("Yes")], [user("Hi"), says("No")]),
        TURN,
        ("Yes", "No"),
    ),
    "a string and messages": (("Hi", [says("Yes")], [says("No")]), TURN, ("Yes", "No")),
    "a string and conversations": (
        ("Hi", [user("Hi"), says("Yes")], [user("Hi"), says("No")]),
        TURN,
        ("Yes", "No"),
    ),
    "messages and strings": ((EARLIER, "Yes", "No"), WHOLE, ("Yes", "No")),
    "conversations": (
        (None, [*EARLIER, says("Yes")], [*EARLIER, says("No")]),
        WHOLE,
        ("Yes", "No"),
    ),
    "texts": ((None, f"{HUMAN} I am", f"{HUMAN} I was"), HUMAN, (" I am", " I was")),
    "words": ((None, "It is black", "It is blue"), "It is", (" black", " blue")),
    "one continues the other": ((None, "ab", "ab c"), "", ("ab", "ab c")),
}


def encode(row, length=200, **more):
    values = dict(zip(("prompt", "chosen", "rejected"), row, strict=True))
    kind, values, ignored = parse_row(json.dumps({**values, **more}), "preference")
    rows = Rows("rows.jsonl", kind, (Row(1, values),))
    return preference.encode_pairs(rows, TOKENIZER, length), ignored


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    row, prompt, completions = FORMS[form]
    (pair,) = encode(row)[0].pairs
    for text, completion in zip((pair.chosen, pair.rejected), completions, strict=True):
        read = lambda ids: TOKENIZER.decode(ids.tolist(), special=True)
        assert read(text.ids[~text.trains]) == prompt
        assert read(text.ids[text.trains]) == f"{completion}<|end|>"


def test_other_keys_are_ignored_and_the_kind_depends_on_the_task(tmp_path):
    """Data such as UltraFeedback has messages for other training beside the preferences."""
    row = ([user("Hi")], "Yes", "No")
    more = {"messages": [user("x"), says("y")], "score": 1.5, "system": "S"}
    found, ignored = encode(row, **more)
    (pair,) = found.pairs
    assert ignored == ["messages", "score"]
    assert TOKENIZER.decode(pair.chosen.ids.tolist(), True).startswith("[system]S<|end|>[user]")
    row = dict(zip(("chosen", "rejected"), row[1:], strict=True))
    (tmp_path / "d.jsonl").write_text(json.dumps({**row, **more}))
    assert read_rows(tmp_path / "d.jsonl").kind == "chat"
    assert read_rows(tmp_path / "d.jsonl", prefer="preference").kind == "preference"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((None, "a", "a"), "chosen and rejected are the same"),
        ((None, "a", [says("b")]), "one of chosen and rejected is a string"),
        ((None, [user("x")], [says("y")]), "chosen contains no assistant turn"),
        (([user("q")], [user("x")], [says("y")]), "chosen contains no assistant turn"),
        ((3, "a", "b"), "prompt is a JSON number, not a string or a list of messages"),
        (("q", " ", "b"), "chosen is empty"),
        ((None, "ab ", "ab c"), "chosen says nothing after what both texts begin with"),
        (("q", {"a": 1}, "b"), "chosen is a JSON object, not a string or a list"),
        (("q", "\ud800", "b"), "half of a surrogate pair"),
    ],
)
def test_rows_that_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        encode(row)


def test_long_pairs(tmp_path):
    """Both texts lose their ends; a pair without a completion is left out, and so noted."""
    found = encode(("abc", "defg", "h"), length=5)[0]
    assert found.pairs[0].chosen.trains.tolist() == [False] * 3 + [True] * 2
    assert found.notes == ("1 of 1 pairs exceed 5 tokens: truncated",)
    with pytest.raises(DataError, match="no pair has tokens of both completions in 3 tokens"):
        encode(("abc", "defg", "h"), length=3)


def test_packed_pairs_have_the_log_probabilities_of_pairs_alone():
    """Against the logits of each text by itself, in float64 by numpy; empty rows count nothing."""
    rng = np.random.default_rng(0)
    draw = lambda: rng.integers(0, tiny_model.VOCABULARY, rng.integers(1, 4)).tolist()
    pairs = [preference.Pair.of(draw(), draw(), draw()) for _ in range(7)]
    data = preference.pack_pairs(pairs, 9)
    assert len(data) < 7 and data.arrays["pairs"].sum() == 7
    params = tiny_model.params()
    batch = data.take(np.array([*range(len(data)), -1]))
    of = preference.log_probs_of_frozen_head(tiny_model.hidden, lambda p: p["head"], chunk=8)
    found = jax.jit(lora.lora(of))(params, batch)
    there = batch["pairs"] > 0

    apply = jax.jit(tiny_model.apply)

    def alone(text, counted):
        ids = np.zeros((1, 12), np.int32)
        ids[0, : len(text)] = text.ids
        logits = np.asarray(apply(params, ids, np.ones_like(ids))[0], np.float64)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        every = np.array([logs[i - 1, text.ids[i]] for i in range(1, len(text))])
        return every[counted(text)[1:]]

    trains, all_of = lambda text: text.trains, lambda text: np.ones(len(text), bool)
    wanted = {
        "chosen": [alone(p.chosen, trains).sum() for p in pairs],
        "rejected": [alone(p.rejected, trains).sum() for p in pairs],
        "chosen_tokens": [p.chosen.trains[1:].sum() for p in pairs],
        "rejected_tokens": [p.rejected.trains[1:].sum() for p in pairs],
        "chosen_text": [alone(p.chosen, all_of).mean() for p in pairs],
    }
    for name, values in wanted.items():
        ours = np.asarray(getattr(found, name))
        np.testing.assert_allclose(sorted(ours[there]), sorted(values), rtol=1e-6, err_msg=name)
    assert (np.asarray(found.chosen)[~there] == -1).all()
    sums = preference.preference_sums(of, lambda policy, _: preference.orpo(policy))
    gradients = jax.jit(jax.grad(lambda p: sums(p, batch)["loss"]))(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_numbers_without_a_meaning():
    probs = preference.LogProbs(*np.full((5, 1), -1.0, np.float32))
    for options, message in (
        ({"kind": "sigmoidal"}, "loss 'sigmoidal' is not one of sigmoid, hinge"),
        ({"beta": 0}, "beta must be above 0"),
        ({"label_smoothing": 0.5}, "must be from 0 to below 0.5"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "is for sigmoid and robust, not for ipo"),
    ):
        with pytest.raises(ValueError, match=message):
            preference.dpo(probs, probs, **options)
