"""Ids and masks of conversations, ids of prompts: what transformers makes of them."""

import dataclasses
import json
import pathlib

import pytest

pytest.importorskip("tokenizers")

from lora_jax.models.text import Tokenizer
from lora_jax.training.dataset import Row, Rows
from lora_jax.training.tokenize import encode_examples

RECORDED = json.loads(pathlib.Path(__file__).with_name("chats.json").read_text("utf-8"))
FAMILIES, TEMPLATES = RECORDED["families"], RECORDED["templates"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    for name, content in FAMILIES[request.param]["files"].items():
        (directory / name).write_text(json.dumps(content), "utf-8")
    return FAMILIES[request.param], Tokenizer.load(directory)


def encode(tokenizer, kind, values):
    rows = Rows("d.jsonl", kind, (Row(1, values),))
    (example,) = encode_examples(rows, tokenizer, 10_000).examples
    return example


def conversation(template, label):
    messages, tools = RECORDED["conversations"]["tools" if template == "tools" else "chatml"][label]
    return {"messages": messages} | ({"tools": tools} if tools else {})


@pytest.mark.parametrize("marked", [False, True], ids=["plain", "marked"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation(family, name, marked):
    """The mask of a template without marks is that of the same template with marks."""
    recorded, tokenizer = family
    tokenizer = dataclasses.replace(tokenizer, chat_template=TEMPLATES[name][marked])
    found = [x for x in recorded["chats"] if x["of"][0] == name]
    assert found
    for x in found:
        example = encode(tokenizer, "chat", conversation(*x["of"]))
        assert example.ids.tolist() == x["ids"], x["of"]
        mask = "".join("01"[int(t)] for t in example.trains)
        assert mask == x["mask"], (x["of"], show(tokenizer, example.ids, mask, x["mask"]))


def show(tokenizer, ids, mask, expected):
    names = [tokenizer.backend.id_to_token(int(i)) for i in ids]
    return [f"{n}: {a} {b}" for n, a, b in zip(names, mask, expected, strict=True) if a != b]


def single(ids, tokenizer):
    """Drop the second of two BOS or EOS, which transformers adds to those in the text."""
    ids = ids[1:] if ids[:2] == [tokenizer.bos_id] * 2 else ids
    return ids[:-1] if ids[-2:] == [tokenizer.eos_id] * 2 else ids


@pytest.mark.parametrize("number", range(len(next(iter(FAMILIES.values()))["prompts"])))
def test_a_prompt_and_its_completion(family, number):
    """Training continues the ids of the prompt, as generation does."""
    recorded, tokenizer = family
    x = recorded["prompts"][number]
    example = encode(tokenizer, "completion", {k: x[k] for k in ("prompt", "completion")})
    asked, whole = (single(x[key], tokenizer) for key in ("asked", "whole"))
    if asked[-1:] == [tokenizer.eos_id] and "</s>" not in x["prompt"]:
        asked = asked[:-1]  # the tokenizer ends every text
    assert tokenizer.encode_prompt(x["prompt"]) == asked
    ids = example.ids.tolist()
    assert ids[: len(asked)] == asked
    assert example.trains.tolist() == [i >= len(asked) for i in range(len(ids))]
    assert ids.count(tokenizer.eos_id) == 1 == ids[::-1].index(tokenizer.eos_id) + 1
    whole = whole if whole[-1] == tokenizer.eos_id else [*whole, tokenizer.eos_id]
    if whole[: len(asked)] == asked:
        assert ids == whole
    else:  # one token holds the end of the prompt and the beginning of the completion
        assert tokenizer.decode(ids, special=True) == tokenizer.decode(whole, special=True)
