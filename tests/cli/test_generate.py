"""`generate` against tokens chosen from the logits of the whole text, without a cache."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import lora_jax
from lora_jax import models, peft
from lora_jax.files.disk import safetensors_file
from lora_jax.models.text.byte_tokenizer import TEMPLATE, byte_tokenizer
from lora_jax.models.text.tokenizer import Tokenizer
from tests.cli import files
from tests.cli import reciter as reciter_model

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def world(tmp_path, monkeypatch):
    files.everything(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def greedy(folder, text, steps, adapter=None):
    """Return the most likely tokens, from the logits of everything so far."""
    pretrained, tokenizer = models.load(folder / "my-model"), Tokenizer.load(folder / "my-model")
    params = pretrained.params
    if adapter:
        params = lora_jax.merge(
            lora_jax.join(params, peft.load(adapter, params, pretrained.naming))
        )
    ids = tokenizer.encode(text)
    prompt = len(ids)
    apply = jax.jit(pretrained.apply)
    for _ in range(steps):
        padded = ids + [0] * (64 - len(ids))  # no token sees those behind it
        ids.append(int(apply(params, jnp.asarray([padded]))[0, len(ids) - 1].argmax()))
        if ids[-1] == tokenizer.eos_id:
            ids.pop()
            break
    return tokenizer.decode(ids[prompt:]) + "\n"


@pytest.mark.parametrize("adapter", [pytest.param(None, marks=pytest.mark.slow), "my-adapter"])
def test_the_likeliest_tokens(world, run, adapter):
    more = ["--adapter", adapter] if adapter else []
    done = run("generate", "--model", "my-model", "--prompt", "Hi", "--max-tokens", 5, *more)
    assert (done.status, done.err) == (0, "")
    assert done.out == greedy(world, "Hi", 5, adapter and world / adapter)


def test_draws_follow_the_seed(world, run):
    words = ["generate", "--model", "my-model", "--prompt", "Hi", "--max-tokens", 6]
    drawn = [*words, "--temperature", 1.5, "--seed"]
    assert run(*drawn, 1).out == run(*drawn, 1).out != run(*drawn, 2).out
    assert run(*drawn, 1, "--top-k", 1).out == run(*words).out
    assert run(*drawn, 1, "--top-p", 1e-6).out == run(*words).out


def test_a_file_standard_input_and_a_chat(world, run, monkeypatch):
    words = ["generate", "--model", "my-model", "--max-tokens", 3]
    plain = run(*words, "--prompt", "Hello there").out
    assert run(*words, "--prompt-file", "prompt.txt").out == plain
    assert (
        run(*words, "--prompt", "Hello there", "--chat").out
        == run(*words, "--prompt", "<s>Hello there</s>").out
    )


@pytest.mark.filterwarnings("default")
def test_what_does_not_fit_is_left_out_if_told_so(world, run, fails):
    more = {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": np.ones((4, 12), "f")}
    files.peft(world / "more", extra=more)
    words = ["generate", "-m", "my-model", "--prompt", "Hi", "--max-tokens", 4, "--adapter"]
    assert "layers.9" in fails(*words, "more")
    done = run(*words, "more", "--no-strict")
    assert done.err.startswith("warning: ") and done.out == run(*words, "my-adapter").out


def test_it_ends_where_the_text_does(world, run):
    """The head always predicts one token, which config.json declares as an end of text."""
    end = 50
    tensors = files.weights()
    embedding, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    embedding[:], tensors["model.norm.weight"][:] = np.abs(embedding) + 9, 1
    head[:], head[end] = 0, 1
    safetensors_file.write(world / "my-model" / "model.safetensors", tensors)
    words = ["generate", "--model", "my-model", "--prompt", "Hi", "--max-tokens", 3]
    said = Tokenizer.load(world / "my-model").decode([end])
    assert run(*words).out == said * 3 + "\n"
    settings = files.SETTINGS | {"eos_token_id": [7, end]}
    (world / "my-model" / "config.json").write_text(json.dumps(settings))
    done = run(*words)
    assert (done.status, done.out) == (0, "\n")


ALPHABET = "abcdefghijklmnopqrstuvwxyzé \n."


@pytest.fixture
def reciter(tmp_path, run):
    """Return a function that generates from a model that recites the alphabet after an "a"."""
    tokenizer = byte_tokenizer()

    def call(*more, end=(), generation=None, template=TEMPLATE, status=0, **settings):
        made = dataclasses.replace(tokenizer, chat_template=template)
        reciter_model.model(tmp_path / "m", made, ALPHABET, end, eos_token_id=None, **settings)
        if generation is not None:
            reciter_model.settings_file(tmp_path / "m", **generation)
        words = ["generate", "--model", tmp_path / "m", "--prompt", "a", "--max-tokens", 40, *more]
        done = run(*words)
        assert (done.status, done.err) == (status, ""), done
        return done.out.removesuffix("\n")

    return call


@pytest.mark.parametrize(
    ("stops", "said"),
    [
        (["f"], "bcde"),
        (["efg"], "bcd"),  # over three tokens
        (["é"], "bcdefghijklmnopqrstuvwxyz"),  # one character of two tokens
        (["z\u00e9 "], "bcdefghijklmnopqrstuvwxy"),
        (["efx", "gh", "i"], "bcdef"),  # "ef" is held back and then given out
        (["q", "hijk"], "bcdefg"),  # the first to be complete
        (["b"], ""),
        (["a", "xx"], ALPHABET[1:]),  # a stop is looked for in the new text only
        ([".\n"], ALPHABET[1:]),  # what is held back at the end belongs to the text
    ],
)
def test_a_stop_text_ends_it(stops, said, reciter):
    options = [word for stop in stops for word in ("--stop", stop)]
    assert reciter(*options, "--max-tokens", len(ALPHABET.encode()) - 1) == said


ENDS = {
    "generation": {"generation": {"eos_token_id": [3, 257]}},
    "template": {"template": "{% for m in messages %}{{ m.content }}<|system|>{% endfor %}"},
    "option": {},
}


@pytest.mark.parametrize("named", ENDS)
def test_every_place_that_names_the_end_of_a_turn(named, reciter):
    """After the alphabet the model gives the token <|system|>, and then an "A"."""
    end = [257, *byte_tokenizer().encode("A")]
    assert byte_tokenizer().decode(end, special=True) == "<|system|>A"
    assert reciter(end=end).startswith(f"{ALPHABET[1:]}A")
    options = ["--stop", "<|system|>"] if named == "option" else []
    assert reciter(*options, end=end, **ENDS[named]) == ALPHABET[1:]


def test_a_long_prompt_leaves_fewer_tokens_or_none(world, run, fails):
    words = ["generate", "--model", "my-model", "--prompt"]
    assert run(*words, "x" * 62, "--max-tokens", 9).out == greedy(world, "x" * 62, 2)
    assert "64 tokens, but the model has only 64 positions" in fails(*words, "x" * 64)


def test_failures(world, fails):
    words = ["generate", "--model", "my-model"]
    assert "give either --prompt or --prompt-file" in fails(*words, status=2)
    both = ["--prompt", "x", "--prompt-file", "prompt.txt"]
    assert "give either" in fails(*words, *both, status=2)
    assert "prompt is empty" in fails(*words, "--prompt", "")
    assert "none.txt: no such file" in fails(*words, "--prompt-file", "none.txt")
    (world / "latin.txt").write_bytes(b"caf\xe9")
    assert "not UTF-8 text" in fails(*words, "--prompt-file", "latin.txt")
    good = [*words, "--prompt", "x"]
    for option in (["--temperature", -1], ["--max-tokens", 0], ["--top-p", 0], ["--top-k", "x"]):
        assert f"Invalid value for '{option[0]}'" in fails(*good, *option, status=2)
    config = world / "my-model" / "tokenizer_config.json"
    config.write_text('{"eos_token": "</s>"}')
    assert "no chat template" in fails(*good, "--chat")
    (world / "my-model" / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in fails(*good)


@pytest.mark.slow
def test_the_tokenizer_beside_the_adapter(world, run):
    """A template alone changes the prompt of a chat; a whole tokenizer replaces the model's."""
    words = ["generate", "--model", "my-model", "--adapter", "my-adapter", "--max-tokens", 3]
    chat, plain = [*words, "--prompt", "Hello", "--chat"], [*words, "--prompt"]
    before = run(*chat).out
    template = world / "my-adapter" / "chat_template.jinja"
    template.write_text("{{ messages[0].content }}, you")
    assert run(*chat).out == run(*plain, "Hello, you").out != before
    template.unlink()
    own = tokenizers.Tokenizer.from_file(str(world / "my-model" / "tokenizer.json"))
    own.normalizer = tokenizers.normalizers.Replace("Hello", "Bye now")
    own.save(str(world / "my-adapter" / "tokenizer.json"))
    expected = run(*plain, "Bye now").out
    assert run(*plain, "Hello").out == expected
    (world / "my-model" / "tokenizer.json").unlink()
    assert run(*plain, "Hello").out == expected


def test_control_characters_of_a_model_do_not_steer_the_terminal(run, world, monkeypatch):
    """A pipe gets the text as it is, a screen what it can show."""
    monkeypatch.setattr(Tokenizer, "stream", lambda *_: iter(["a\x1b[2J", "\x07b\tc"]))
    words = ("generate", "--model", "my-model", "--prompt", "Hello", "--max-tokens", "2")
    assert run(*words).out == "a\x1b[2J\x07b\tc\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert run(*words).out == "a\\x1b[2J\\x07b\tc\n"
