"""SentencePiece in GGUF files, against `sentencepiece` 0.2.3; see record_pieces.py."""

import json
import pathlib

import pytest
from gguf import GGUFWriter

from lora_jax.core.errors import ModelFileError
from lora_jax.models.text import Tokenizer

RECORDED = json.loads((pathlib.Path(__file__).parent / "pieces.json").read_text())


def write(path, name, **changes):
    given = RECORDED[name]
    fields = {
        "scores": given["scores"],
        "token_type": given["types"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_space_prefix": name == "with",
    }
    writer = GGUFWriter(path, "gemma")
    writer.add_tokenizer_model("llama")
    writer.add_array("tokenizer.ggml.tokens", given["tokens"])
    adds = {list: writer.add_array, bool: writer.add_bool, int: writer.add_uint32}
    for key, value in (fields | changes).items():
        adds[type(value)](f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["with", "without"])
def test_ids_are_those_of_sentencepiece(tmp_path, name):
    tokenizer = Tokenizer.from_gguf(write(tmp_path / "x.gguf", name))
    given = RECORDED[name]
    assert [tokenizer.encode(text) for text in RECORDED["texts"]] == given["ids"]
    assert [tokenizer.decode(ids) for ids in given["ids"]] == given["decoded"]
    assert tokenizer.encode("the", special=True)[0] == 1  # llama.cpp adds it by default


def test_tokens_of_the_chat_are_found_first(tmp_path):
    kinds = RECORDED["without"]["types"]
    number = RECORDED["without"]["tokens"].index("▁the")
    kinds = [4 if i == number else kind for i, kind in enumerate(kinds)]
    path = write(tmp_path / "x.gguf", "without", token_type=kinds, add_bos_token=False)
    tokenizer = Tokenizer.from_gguf(path)
    assert tokenizer.encode("x▁thex", special=True).count(number) == 1
    assert number not in tokenizer.encode("x thex")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [1.0, 2.0]}, "scores must be 340 finite numbers"),
        ({"scores": [float("nan")] * 340}, "scores must be 340 finite numbers"),
        ({"token_type": [1]}, "1 token types for 340"),
    ],
)
def test_what_cannot_be_read(tmp_path, changes, message):
    with pytest.raises(ModelFileError, match=rf"x\.gguf: .*{message}"):
        Tokenizer.from_gguf(write(tmp_path / "x.gguf", "with", **changes))
