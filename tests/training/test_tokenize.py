"""Token ids and masks of each kind of row, by hand."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers

from lora_jax.models.text.byte_tokenizer import byte_tokenizer
from lora_jax.training import dataset, tokenize
from lora_jax.training.dataset import Row, Rows
from lora_jax.training.errors import DataError
from lora_jax.training.rows.forms import read_row
from tests.training.tiny_model import Letters

A, B, C = 3, 4, 5  # the ids of the letters
BOS, EOS = 1, 2


def encode(kind, *values, length=12, tokenizer=None, **more):
    numbered = tuple(Row(i, value) for i, value in enumerate(values, start=1))
    rows = Rows("d.jsonl", kind, numbered)
    return tokenize.encode_examples(rows, tokenizer or Letters(), length, **more)


def test_text():
    (example,) = encode("text", {"text": "abc"}).examples
    np.testing.assert_array_equal(example.ids, [BOS, A, B, C, EOS])
    np.testing.assert_array_equal(example.trains, [False, True, True, True, True])


def test_a_tokenizer_without_bos_and_eos():
    class Plain(Letters):
        eos_id = None

        def encode(self, text, special=False):
            return super().encode(text)

    (example,) = encode("text", {"text": "abc"}, tokenizer=Plain()).examples
    np.testing.assert_array_equal(example.ids, [A, B, C])
    assert example.trains.all()


def test_the_prompt_does_not_train():
    (example,) = encode("completion", {"prompt": "ab", "completion": "c"}).examples
    np.testing.assert_array_equal(example.ids, [BOS, A, B, C, EOS])
    np.testing.assert_array_equal(example.trains, [False, False, False, True, True])


TURNS = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "bb")]


def chat(turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_only_the_assistant_trains():
    turns = [*TURNS, ("user", "left out")]
    (example,) = encode("chat", chat(turns), length=99).examples
    whole = "<system>s|<user>u|<assistant>a|<user>v|<assistant>bb|"
    assert list(example.ids) == list(Letters().encode(whole))
    trained = "".join(letter for letter, t in zip(whole, example.trains, strict=True) if t)
    assert trained == "a|bb|"


def test_an_assistant_that_opens():
    (example,) = encode("chat", chat([("assistant", "a")]), length=99).examples
    assert example.trains.all() and len(example) == len("<assistant>a|")


def test_a_template_that_rewrites_earlier_turns():
    class Forgetful(Letters):
        def chat(self, messages, add_generation_prompt=False):
            return super().chat(messages[-2:], add_generation_prompt)

    with pytest.raises(DataError, match=r"line 1: the chat template rewrites .* at messages\[2\]"):
        encode("chat", chat(TURNS), tokenizer=Forgetful())


def test_a_tokenizer_without_a_template():
    class Bare(Letters):
        def chat(self, messages, add_generation_prompt=False):
            raise ValueError("there is no chat template")

    with pytest.raises(DataError, match="line 1: there is no chat template"):
        encode("chat", chat(TURNS), tokenizer=Bare())


def test_long_texts_are_cut_into_pieces_that_overlap_by_one():
    found = encode("text", {"text": "abcabc"}, {"text": "ab"}, length=4)
    pieces = [list(example.ids) for example in found.examples]
    assert pieces == [[BOS, A, B, C], [C, A, B, C], [C, EOS], [BOS, A, B, EOS]]
    # every token but BOS is predicted once
    assert sum(int(e.trains[1:].sum()) for e in found.examples) == 7 + 3
    assert found.notes == ("1 of 2 texts exceed 4 tokens: cut into pieces",)


def test_long_rows_are_cut_off_and_told():
    found = encode(
        "completion",
        {"prompt": "ab", "completion": "abc"},
        {"prompt": "abcabc", "completion": "a"},
        {"prompt": "a", "completion": "b"},
        length=4,
    )
    assert [list(e.ids) for e in found.examples] == [[BOS, A, B, A], [BOS, A, B, EOS]]
    assert found.notes == (
        "2 of 3 rows exceed 4 tokens: truncated, which loses 5 of 8 tokens to train on "
        "(see --length)",
        "1 rows left out: nothing to train on in 4 tokens",
    )
    with pytest.raises(
        DataError, match="no tokens to train on are left in rows of 3 tokens; increase"
    ):
        encode("completion", {"prompt": "abcabc", "completion": "a"}, length=3)


def test_labelled_rows_are_not_for_a_language_model():
    with pytest.raises(DataError, match=r"cannot be trained on .* use --task classification"):
        encode("label", {"text": "x", "label": 1})


def test_a_stream(tmp_path):
    (tmp_path / "d.txt").write_text("abc")
    ids = tokenize.encode_stream(dataset.read_rows(tmp_path / "d.txt"), Letters())
    assert ids.dtype == np.int32 and list(ids) == [A, B, C]
    (tmp_path / "d.txt").write_text("a")
    with pytest.raises(DataError, match="the text is a single token"):
        tokenize.encode_stream(dataset.read_rows(tmp_path / "d.txt"), Letters())


def test_tokens_beyond_the_vocabulary(tmp_path):
    good, bad = {"text": "abc"}, {"text": "abz"}
    assert encode("text", good, vocabulary=C + 1).examples
    with pytest.raises(DataError) as error:
        encode("text", good, bad, bad, bad, vocabulary=C + 1)
    assert str(error.value) == (
        "d.jsonl, line 2 and 2 more of 4 rows: the token 28 is beyond the model's vocabulary, "
        "which ends at 5; use the tokenizer that belongs to the model, remove the token from the "
        "data, or grow the vocabulary first (models.resize_vocabulary)"
    )
    with pytest.raises(DataError, match=r"line 1: the token 2 is .* ends at 1"):
        encode("completion", {"prompt": "", "completion": ""}, vocabulary=EOS)
    (tmp_path / "d.txt").write_text("abz")
    rows = dataset.read_rows(tmp_path / "d.txt")
    with pytest.raises(DataError, match=r"d\.txt, token 3: the token 28"):
        tokenize.encode_stream(rows, Letters(), vocabulary=C + 1)


def test_a_token_beyond_the_vocabulary_has_a_name():
    tokenizer = byte_tokenizer()
    with pytest.raises(DataError, match=r"line 1: the token '<\|end\|>' \(256\) is"):
        encode("text", {"text": "abc"}, tokenizer=tokenizer, vocabulary=256)


TURN = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def test_a_template_without_a_stop_token():
    """The end of a turn is left to the next message, or there is none."""
    leaves = (
        "{% for m in messages %}{% if not loop.first %}<|end|>{% endif %}"
        "<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|end|><|assistant|>{% endif %}"
    )
    tokenizer = byte_tokenizer()
    stops = {tokenizer.eos_id}
    assert encode("chat", TURN, tokenizer=tokenizer, stops=stops).notes == ()
    longer = {"messages": TURN["messages"] * 2}
    found = encode(
        "chat",
        *(TURN, longer),
        length=99,
        tokenizer=dataclasses.replace(tokenizer, chat_template=leaves),
        stops=stops,
    )
    assert len(found.examples) == 2 and len(found.notes) == 1
    assert "no stop token is trained on, because the chat template writes none" in found.notes[0]
    bare = dataclasses.replace(tokenizer, eos=None)
    found = encode("completion", {"prompt": "a", "completion": "b"}, tokenizer=bare, stops=stops)
    assert "because the tokenizer has no end-of-text token" in found.notes[0]


OPENINGS = {
    "ordinary words": ("### {{ m.role }}:\n{{ m.content }}\n\n", "### assistant:\n"),
    "no line between": ("<{{ m.role }}>{{ m.content }}</s>", "<assistant>"),
    "capitals": ("{{ m.role | upper }}: {{ m.content }} ", "ASSISTANT: "),
}


@pytest.mark.parametrize("name", OPENINGS)
@pytest.mark.parametrize("count", [1, 2])
def test_a_template_that_always_opens(name, count):
    """The assistant's opening is after its last words, too; it never trains."""
    turn, opening = OPENINGS[name]
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        + turn.replace("### {{ m.role }}:\n", "").replace("<{{ m.role }}>", "")
        .replace("{{ m.role | upper }}: ", "")
        + "{% else %}" + turn + "{% endif %}{% if m.role != 'assistant' or loop.last %}" + opening
        + "{% endif %}{% endfor %}"
    )  # fmt: skip
    tokenizer = dataclasses.replace(byte_tokenizer(), chat_template=template)
    words = [("user", "how?"), ("assistant", "so"), ("user", "why?"), ("assistant", "thus")]
    (example,) = encode("chat", chat(words[: 2 * count]), length=999, tokenizer=tokenizer).examples
    ending = turn.partition("{{ m.content }}")[2]
    text = tokenizer.decode(example.ids[example.trains].tolist())
    assert text == "".join(word + ending for role, word in words[: 2 * count] if role != "user")


def test_bos_and_eos_in_the_text_are_not_repeated():
    tokenizer = byte_tokenizer()
    (example,) = encode("text", {"text": "ab<|end|>"}, tokenizer=tokenizer).examples
    assert example.ids.tolist() == [*tokenizer.encode("ab"), tokenizer.eos_id]
    for ending in ("<|end|>", "<|end|>\n"):
        row = {"prompt": "a", "completion": "b" + ending}
        (example,) = encode("completion", row, tokenizer=tokenizer).examples
        assert example.ids.tolist() == tokenizer.encode("ab" + ending)
    row = {"prompt": "a", "completion": "b<|end|>c"}
    (example,) = encode("completion", row, tokenizer=tokenizer).examples
    assert example.ids.tolist() == tokenizer.encode("ab<|end|>c<|end|>")

    class Spells(Letters):
        def encode(self, text, special=False):
            ids = super().encode(text.removeprefix("S"))
            return [BOS, *ids] if special or text[:1] == "S" else ids

    (example,) = encode("text", {"text": "Sa"}, tokenizer=Spells()).examples
    assert example.ids.tolist() == [BOS, A, EOS]


def test_alpaca_without_a_template():
    """A model without a chat template reads the prompt that came with these data."""
    row = read_row({"instruction": "Sing", "output": "la"})[1]
    tokenizer = byte_tokenizer()
    (example,) = encode("chat", row, length=999, tokenizer=tokenizer).examples
    assert tokenizer.decode(example.ids.tolist(), True) == (
        "<|user|>Sing<|end|><|assistant|>la<|end|>"
    )
    bare = dataclasses.replace(tokenizer, chat_template=None)
    (example,) = encode("chat", row, length=999, tokenizer=bare).examples
    text = tokenizer.decode(example.ids.tolist(), True)
    assert text.startswith("Below is an instruction") and text.endswith("Response:\nla<|end|>")
    assert tokenizer.decode(example.ids[example.trains].tolist(), True) == "la<|end|>"


PARTS = [{"type": "text", "text": "how "}, {"type": "text", "text": "so?"}]


@pytest.mark.parametrize(
    "content",
    [
        "{{ m.content }}",  # text alone, which would write the list
        "{% for part in m.content %}{{ part.text }}{% endfor %}",  # parts alone
        "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
        "{{ part['text'] }}{% endfor %}{% endif %}",
    ],
)
def test_parts_and_text_in_any_template(content):
    template = "{% for m in messages %}<" + content + ">{% endfor %}"
    tokenizer = dataclasses.replace(byte_tokenizer(), chat_template=template)
    turns = [("user", PARTS), ("assistant", "thus"), ("user", "how so?"), ("assistant", PARTS)]
    (example,) = encode("chat", chat(turns), length=99, tokenizer=tokenizer).examples
    assert tokenizer.decode(example.ids.tolist()) == "<how so?><thus><how so?><how so?>"
    assert tokenizer.decode(example.ids[example.trains].tolist()) == "<thus><how so?>"


def test_a_call_without_content_trains():
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}|{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = dataclasses.replace(byte_tokenizer(), chat_template=template)
    messages = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "3!"},
    ]
    found = encode("chat", {"messages": messages}, length=999, tokenizer=tokenizer)
    (example,) = found.examples
    assert found.notes == ()
    text = tokenizer.decode(example.ids[example.trains].tolist())
    assert text == '{"name": "f"}|3!|'


def test_tools_that_a_template_does_not_write():
    messages = [{"role": "assistant", "content": "x", "tool_calls": [{"function": {}}]}]
    row = {"messages": messages, "tools": [{"type": "function"}]}
    note = "the chat template does not write tools and tool_calls, so they are left out"
    assert encode("chat", row, row, tokenizer=byte_tokenizer()).notes == (note,)
    both = dataclasses.replace(byte_tokenizer(), tool_template="{{ tools }}{{ m.tool_calls }}x")
    assert encode("chat", {"messages": messages[:1]}, tokenizer=both).notes == ()


def merging(*merges):
    """Return the tokenizer of bytes with merges: "Ġ x" makes one token of a space and an x."""
    state = json.loads(byte_tokenizer().backend.to_str())
    count = len(byte_tokenizer())
    state["model"]["merges"] = [merge.split() for merge in merges]
    state["model"]["vocab"] |= {m.replace(" ", ""): count + i for i, m in enumerate(merges)}
    state["pre_tokenizer"]["use_regex"] = False  # merges across words and lines
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    return dataclasses.replace(byte_tokenizer(), backend=backend)


def tokens(tokenizer, ids):
    return [tokenizer.backend.id_to_token(int(i)) for i in ids]


def test_a_token_across_the_beginning_of_a_turn_trains():
    """The ids are those of the whole text, and part of the token is the assistant's."""
    template = (
        "{% for m in messages %}{{ m.role[0] }}Q\n{{ m.content }}\nE{% endfor %}"
        "{% if add_generation_prompt %}aQ\n{% endif %}"
    )
    tokenizer = dataclasses.replace(merging("Ċ Ċ", "Ċ E"), chat_template=template)
    turns = [("user", "u"), ("assistant", "\nb"), ("user", "\n")]
    (example,) = encode("chat", chat(turns), length=99, tokenizer=tokenizer).examples
    assert tokens(tokenizer, example.ids) == ["u", "Q", "Ċ", "u", "ĊE", "a", "Q", "ĊĊ", "b", "ĊE"]
    assert tokens(tokenizer, example.ids[example.trains]) == ["ĊĊ", "b", "ĊE"]


@pytest.mark.parametrize("merges", [["Ġ x"], ["Ġ x", "Ċ x", "a x", ". x", "0 x"]])
def test_a_token_across_the_end_of_a_prompt_is_divided(merges):
    tokenizer = merging(*merges)
    row = {"prompt": "q ", "completion": "x x"}
    (example,) = encode("completion", row, tokenizer=tokenizer).examples
    assert tokens(tokenizer, example.ids) == ["q", "Ġ", "x", "Ġx", "<|end|>"]
    assert tokens(tokenizer, example.ids[example.trains]) == ["x", "Ġx", "<|end|>"]


def test_an_earlier_turn_that_is_written_otherwise_starts_after_the_prompt():
    """The last turn alone has thoughts and an end; the space is in every turn."""
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %} "
        "{% if loop.last %}<think></think>{% endif %}{% endif %}{{ m.content }}"
        "{% if loop.last %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = dataclasses.replace(byte_tokenizer(), chat_template=template)
    turns = [("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b")]
    (example,) = encode("chat", chat(turns), length=99, tokenizer=tokenizer).examples
    text = tokenizer.decode(example.ids[example.trains].tolist(), True)
    assert text == " a <think></think>b<|end|>"
