"""Where generation ends: every file that names an id, and what a chat template writes."""

import json

import pytest
import tokenizers
from tokenizers import models as backends
from tokenizers import pre_tokenizers

from lora_jax.core.errors import ModelFileError
from lora_jax.models.stops import stop_ids
from lora_jax.models.text import Tokenizer
from lora_jax.models.text.byte_tokenizer import byte_tokenizer
from tests.models.text.test_tokenizer import TOKENS, write_gguf

EOS, END, USER, ASSISTANT, TURN = range(5)
SPECIAL = ["</s>", "<|im_end|>", "<|user|>", "<|assistant|>", "<end_of_turn>"]


def tokenizer(template=None, eos="</s>"):
    model = backends.WordLevel({token: i for i, token in enumerate([*SPECIAL, "?"])}, unk_token="?")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(SPECIAL)
    return Tokenizer(backend, eos=eos, chat_template=template)


def turn(after, between=""):
    """Return a template that writes one text after every turn, another before later ones."""
    return (
        "{% for m in messages %}{% if not loop.first %}" + between + "{% endif %}"
        "<|{{ m.role }}|>\n{{ m.content }}" + after + "{% endfor %}"
    )


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (None, {EOS}),
        (turn("<|im_end|>\n"), {EOS, END}),
        (turn(" </s>"), {EOS}),
        (turn("\n<end_of_turn>\n"), {EOS, TURN}),
        (turn("", between="<|im_end|>"), {EOS, END}),  # left to the next message
        (turn(""), {EOS, USER}),  # nothing but the user's opening tells that the turn is over
        (turn("\n\n### "), {EOS}),  # ordinary text
        ("{{ raise_exception('no') }}", {EOS}),
        ("{{ messages[0].content }}<|user|>", {EOS}),  # leaves out the assistant's words
    ],
)
def test_the_turn_end_of_a_template(template, found):
    assert stop_ids(None, tokenizer(template)) == found


def test_the_template_made_here():
    assert stop_ids(None, byte_tokenizer()) == {byte_tokenizer().eos_id}


@pytest.mark.parametrize(
    ("config", "generation", "found"),
    [
        ({}, None, {EOS}),
        ({"eos_token_id": 3}, None, {EOS, 3}),
        ({"eos_token_id": [3, 4]}, None, {EOS, 3, 4}),
        ({"eos_token_id": None}, {"eos_token_id": 128009}, {EOS, 128009}),
        ({"eos_token_id": 3}, {"eos_token_id": [128001, 128008, 128009]},
         {EOS, 3, 128001, 128008, 128009}),
        ({"eos_token_id": -1}, {"temperature": 0.6}, {EOS}),
    ],
)  # fmt: skip
def test_the_settings_of_a_directory(tmp_path, config, generation, found):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert stop_ids(tmp_path, tokenizer()) == found


def test_the_ids_of_a_gguf_file(tmp_path):
    ids = {"eos_token_id": 1, "eot_token_id": 7, "eom_token_id": 9}
    path = write_gguf(tmp_path / "x.gguf", **ids)
    assert stop_ids(path, tokenizer(eos=None)) == {1, 7, 9}
    assert TOKENS[1] == Tokenizer.from_gguf(path).eos


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "not valid JSON"),
        ("[2]", "is not a JSON object"),
        ('{"eos_token_id": "</s>"}', "eos_token_id must be an integer or a list .* got '</s>'"),
        ('{"eos_token_id": [2, true]}', "got True"),
        ('{"eos_token_id": [[2]]}', r"got \[2\]"),
    ],
)
def test_damaged_settings(tmp_path, content, message):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ModelFileError, match=rf"generation_config\.json: .*{message}"):
        stop_ids(tmp_path, tokenizer())


def test_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="none: no such file or directory"):
        stop_ids(tmp_path / "none", tokenizer())
