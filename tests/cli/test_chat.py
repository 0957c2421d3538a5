"""`chat`, and `generate --system`: what the model sees in each turn, and what is remembered."""

import dataclasses
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lora_jax.cli.jobs import speaker as speakers
from lora_jax.models import generation
from lora_jax.models.text.byte_tokenizer import byte_tokenizer
from lora_jax.training import dataset
from tests.cli import files
from tests.cli import reciter as reciter_model

pytestmark = pytest.mark.usefixtures("quick_compile")

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}[{{ m.content }}]"
    "{% elif m.role == 'user' %}<{{ m.content }}>{% else %}{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)
LETTERS = "abcdefghijklm"


@pytest.fixture
def model(tmp_path):
    """After an "a" the model says the letters to m, then <|end|>; its template ends in an "a"."""
    made = dataclasses.replace(byte_tokenizer(), chat_template=TEMPLATE)
    end = [byte_tokenizer().eos_id]
    settings = {"max_position_embeddings": 256, "eos_token_id": end[0]}
    return reciter_model.model(tmp_path / "m", made, LETTERS, end, **settings)


@pytest.fixture
def seen(monkeypatch):
    """Return the prompts that the model was given, as text, without padding."""
    prompts, stream = [], generation.stream

    def record(apply, params, ids, *more, segments, **options):
        kept = np.asarray(ids)[np.asarray(segments) > 0]
        prompts.append(byte_tokenizer().decode(kept.tolist(), special=True))
        return stream(apply, params, ids, *more, segments=segments, **options)

    monkeypatch.setattr(speakers.generation, "stream", record)
    return prompts


@pytest.fixture
def talk(run, monkeypatch, model):
    def call(lines, *more):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        return run("chat", "-m", model, *more)

    return call


SAID = LETTERS[1:]


def test_each_turn_sees_the_turns_before_it(talk, seen):
    done = talk("Hi\n\nAgain \n/reset\nNew\n/exit\nlost\n", "--system", "Be kind.")
    assert (done.status, done.err) == (0, "")
    assert done.out == f"{SAID}\n" * 3
    first = "[Be kind.]<Hi>a"
    assert seen == [first, f"{first[:-1]}{SAID}<|end|><Again>a", "[Be kind.]<New>a"]


def test_a_stop_text_and_an_adapter(talk, seen, tmp_path):
    files.peft(tmp_path / "adapter", config={"lora_alpha": 1e-9})
    done = talk("Hi\nMore\n", "--stop", "gh", "--adapter", tmp_path / "adapter", "--seed", 3)
    assert (done.status, done.out) == (0, "bcdef\nbcdef\n")
    assert seen[1] == "<Hi>bcdef<|end|><More>a"


def loud_adapter(path, seed):
    """Write an adapter that changes what the model says."""
    rng = np.random.default_rng(seed)
    shapes = {"A": (files.RANK, files.OUT), "B": (files.WIDTH, files.RANK)}
    extra = {
        f"base_model.model.model.layers.{n}.self_attn.o_proj.lora_{name}.weight": rng.normal(
            size=shape
        ).astype(np.float32)
        for n in range(2)
        for name, shape in shapes.items()
    }
    modules = ["q_proj", "v_proj", "o_proj"]
    return files.peft(path, seed, {"target_modules": modules, "lora_alpha": 40}, extra)


def test_commands(talk, seen, tmp_path):
    """Another adapter, another system message, a file of what was said, and mistakes."""
    files.peft(tmp_path / "one", config={"lora_alpha": 1e-9})
    loud_adapter(tmp_path / "two", seed=4)
    lines = ["Hi", "/adapter two", "/reset", "/system Be kind.", "Hi", "/adapter none", "Hi"]
    lines += [f"/save {tmp_path / 'chats.jsonl'}", "/adapters", "/adapter three", "/what", "/reset"]
    lines += ["/save x", "/etc/passwd is a file", "/help"]
    adapters = ("--adapter", tmp_path / "one", "--adapter", f"two={tmp_path / 'two'}")
    done = talk("\n".join(lines), *adapters, "--max-tokens", 12)
    assert done.status == 0
    one, two, base, path = done.out.splitlines()
    assert one == base == path == SAID and two != SAID
    said = f"[Be kind.]<Hi>{two}"
    assert seen[:2] == ["<Hi>a", "[Be kind.]<Hi>a"] and seen[2].startswith(said)
    assert seen[3] == "[Be kind.]</etc/passwd is a file>a"
    notes = done.err.splitlines()
    assert notes[:7] == [
        f"saved 4 turns in {tmp_path / 'chats.jsonl'}",
        *("  one", "  two", "* base"),
        "three is not one of one, two, base",
        "/what is not a command; /help lists them",
        "nothing was said yet, so nothing is saved",
    ]
    assert any(line.startswith("/save FILE") for line in notes[7:])
    rows = dataset.read_rows(tmp_path / "chats.jsonl")
    turns = [turn["content"] for turn in rows.rows[0].values["messages"]]
    assert rows.kind == "chat" and turns == ["Be kind.", "Hi", two, "Hi", SAID]


@pytest.mark.slow
def test_each_adapter_of_a_stack_says_what_it_says_alone(talk, tmp_path, monkeypatch):
    for seed, name in enumerate(("one", "two")):
        loud_adapter(tmp_path / name, seed)
    alone = {name: talk("Hi\n", "--adapter", tmp_path / name).out for name in ("one", "two")}
    both = ("--adapter", tmp_path / "one", "--adapter", tmp_path / "two")
    advance, programs = generation._advance, []
    size = lambda *x: (advance(*x), programs.append(advance._cache_size()))[0]
    monkeypatch.setattr(generation, "_advance", size)
    done = talk("/adapter two\nHi\n/reset\n/adapter one\nHi\n/reset\n/adapter none\nHi\n", *both)
    assert done.out == alone["two"] + alone["one"] + f"{SAID}\n"
    assert alone["one"] != alone["two"] and programs[1] == programs[-1]  # of the prompt, of a token
    assert talk("/adapter base\nHi\n", *both[:2]).out == f"{SAID}\n"


def test_turns_share_a_compilation(talk, monkeypatch):
    shapes = set()
    advance = generation._advance
    monkeypatch.setattr(
        generation, "_advance", lambda *x: (shapes.add((x[2].shape, x[4].length)), advance(*x))[1]
    )
    assert talk("a\nbb\nccc\n", "--max-tokens", 16).status == 0
    assert shapes == {((1, 64), 80), ((1, 1), 80)}


def test_a_long_conversation_loses_its_oldest_turns(talk, seen):
    """Of 256 positions 64 are left for the answer."""
    done = talk("".join(f"{c * 70}\n" for c in "xyz"), "--system", "S", "--max-tokens", 500)
    assert done.status == 0 and done.out == f"{SAID}\n" * 3
    assert done.err == "note: the conversation is too long; its oldest turns are left out\n"
    assert seen[2] == f"[S]<{'y' * 70}>{SAID}<|end|><{'z' * 70}>a"
    done = talk("x" * 300)
    assert done.status == 1 and "has 303 tokens, but the model has only 256 positions" in done.err


@pytest.mark.slow
def test_a_system_message_of_one_prompt(run, model, seen):
    words = ["generate", "-m", model, "--prompt", "Hi"]
    assert run(*words, "--system", "Be kind.").out == f"{SAID}\n"
    assert run(*words, "--system", "", "--chat").out == f"{SAID}\n"
    assert run(*words, "--chat").out == f"{SAID}\n"
    assert seen == ["[Be kind.]<Hi>a", "[]<Hi>a", "<Hi>a"]


def test_failures(talk, fails, model):
    (model / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    assert "no chat template" in fails("chat", "-m", model)
    assert "no chat template" in fails("generate", "-m", model, "--prompt", "x", "--system", "y")
    assert "--stop must not be empty" in fails("chat", "-m", model, "--stop", "", status=2)
    assert "lora-jax chat" in fails("generate", "-m", model, "--chat", status=2)


PROGRAM = "import sys; from lora_jax.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_ends_an_answer_and_not_the_conversation(model):
    """The model, sampled without an end, is stopped by a signal; then it answers again."""
    master, slave = pty.openpty()
    words = [sys.executable, "-c", PROGRAM, "chat", "-m", str(model), "--max-tokens", "120"]
    words += ["--temperature", "40"]
    process = subprocess.Popen(
        words, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    shown = b""

    def wait_for(count):
        nonlocal shown
        until = time.monotonic() + 60
        while shown.count(b"> ") < count:
            assert time.monotonic() < until and process.poll() is None, shown
            if select.select([master], [], [], 1)[0]:
                shown += os.read(master, 4096)

    wait_for(1)
    os.write(master, b"Hi\n")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    wait_for(2)
    os.write(master, b"/exit\n")
    assert process.wait(30) == 0, shown
    assert b"Traceback" not in shown
    os.close(master)
