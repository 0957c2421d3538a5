"""`eval` of answers: choices and preferences by logits in float64, a model that recites."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import lora_jax
from lora_jax import models, peft
from lora_jax.cli.jobs.evaluating import report
from lora_jax.models.text.byte_tokenizer import byte_tokenizer
from lora_jax.models.text.tokenizer import Tokenizer
from tests.cli import reciter
from tests.cli.test_eval import world

pytestmark = pytest.mark.usefixtures("quick_compile")
__all__ = ["world"]

QUESTIONS = [
    ("2 + 2 =", ["3", "4", "five hundred"], 1),
    ("The sky is", [" blue", " a fish"], "A"),
    ("Name:", ["x", "yy", "zzz"], "zzz"),
    ("A", ["bcd", "bce"], 1),
]


def write(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def reader(folder, adapter):
    """Return the log-probability of a text after a prompt, from the logits of the merged model."""
    pretrained, tokenizer = models.load(folder / "my-model"), Tokenizer.load(folder / "my-model")
    params = pretrained.params
    if adapter:
        overlay = peft.load(folder / adapter, params, pretrained.naming)
        params = lora_jax.merge(lora_jax.join(params, overlay))
    apply = jax.jit(pretrained.apply)

    def log_prob(prompt, text):
        asked = tokenizer.encode(prompt)
        ids = [*asked, *tokenizer.encode(text)]
        padded = np.zeros((1, 40), np.int32)
        padded[0, : len(ids)] = ids
        logits = np.asarray(apply(params, padded), np.float64)[0]
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return sum(logs[i - 1, ids[i]] for i in range(len(asked), len(ids)))

    return log_prob


@pytest.mark.parametrize(
    "adapters",
    [("my-adapter",), pytest.param(("base", "my-adapter"), marks=pytest.mark.slow)],
)
def test_choices_beside_logits(adapters, world, run):
    """The share of right answers, by sums and per character."""
    write(
        world / "q.jsonl",
        [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS],
    )
    right = [1, 0, 2, 1]
    words = ["eval", "-m", "my-model", "--data", "q.jsonl", "--batch", 2]
    words += [word for name in adapters for word in ("--adapter", name)]
    found = json.loads(run(*words, "--json").out)
    found = [found] if len(adapters) == 1 else found
    for one, name in zip(found, adapters, strict=True):
        assert one.get("adapter", name) == name
        log_prob = reader(world, None if name == "base" else name)
        hits = np.zeros((2, len(QUESTIONS)))
        for i, (prompt, texts, _) in enumerate(QUESTIONS):
            spaced = [text if text[0] == " " else f" {text}" for text in texts]
            sums = np.array([log_prob(prompt, text) for text in spaced])
            sizes = np.array([len(text) for text in texts])
            hits[:, i] = [sums.argmax() == right[i], (sums / sizes).argmax() == right[i]]
        assert [one["accuracy"], one["normalized_accuracy"]] == hits.mean(1).tolist()
        assert one["questions"] == len(QUESTIONS)


def test_several_adapters_make_a_table(capsys):
    found = [{"questions": 4, "accuracy": 0.5}, {"questions": 4, "accuracy": 0.75}]
    report.show(["base", "my-adapter"], found, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["adapter", "questions", "accuracy"],
        ["base", "4", "50.00%"],
        ["my-adapter", "4", "75.00%"],
    ]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.slow
def test_preferences_beside_logits(world, run):
    rows = [("2 + 2 =", " 4", " 5, or so"), ("Say", " a", " b"), ("The", " sky", " x y z")]
    names = ("prompt", "chosen", "rejected")
    write(world / "p.jsonl", [dict(zip(names, row, strict=True)) for row in rows])
    words = ["eval", "-m", "my-model", "--adapter", "my-adapter", "--data", "p.jsonl", "--json"]
    found = json.loads(run(*words).out)
    log_prob = reader(world, "my-adapter")
    margins = [np.subtract(*(log_prob(q, f"{text}</s>") for text in both)) for q, *both in rows]
    assert found["pairs"] == 3 and found["accuracy"] == np.mean(np.array(margins) > 0)
    assert found["log_prob_margin"] == pytest.approx(np.mean(margins), rel=1e-4)


@pytest.mark.slow
def test_exact_matches_of_a_model_that_recites(tmp_path, run, monkeypatch):
    """It continues a letter with the rest of the alphabet, and then ends."""
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_tokenizer()
    reciter.model(tmp_path / "m", tokenizer, "abcdefghij", [tokenizer.eos_id])
    rows = [
        {"prompt": "a", "completion": "bcdefghij"},
        {"prompt": "h", "completion": " ij\n"},  # spaces around do not count
        {"prompt": "d", "completion": "efghi"},  # the model says more
        {"prompt": "e", "completion": "FGHIJ"},
        {"prompt": "f", "answer": "ghij"},
    ]
    write(tmp_path / "d.jsonl", rows)
    words = ["eval", "-m", "m", "--data", "d.jsonl", "--exact-match", "--batch", 2, "--json"]
    found = json.loads(run(*words).out)
    assert (found["answers"], found["exact_match"]) == (5, 0.6)


@pytest.mark.slow
def test_answers_that_are_cut_off_do_not_match(tmp_path, run, monkeypatch):
    """Conversations: the answer is what the assistant says last."""
    monkeypatch.chdir(tmp_path)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = dataclasses.replace(byte_tokenizer(), chat_template=template)
    reciter.model(tmp_path / "m", tokenizer, "abcdefghij", [tokenizer.eos_id])
    turns = lambda *texts: {
        "messages": [
            {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
        ]
    }
    write(tmp_path / "d.jsonl", [turns("a", "bcdefghij"), turns("a", "b", "h", "ij")])
    words = ["eval", "-m", "m", "--data", "d.jsonl", "--exact-match", "--json"]
    assert json.loads(run(*words).out)["exact_match"] == 1
    assert json.loads(run(*words, "--max-tokens", 3).out)["exact_match"] == 0.5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": ["a"], "answer": 0}, "choices must be two texts or more"),
        ({"choices": ["a", "b"], "answer": 2}, "nor its number from 0 to 1"),
        ({"choices": ["a", "b"], "answer": "C"}, "answer is 'C': neither a choice"),
        ({"choices": ["a", "a"], "answer": 0}, "choices contains the same text twice"),
        ({"choices": "a, b", "answer": 0}, "choices is a string that is not valid JSON"),
        ({"choices": ["a", "b" * 80], "answer": 0}, "a choice has 65 tokens or more"),
    ],
)
def test_questions_that_are_refused(row, message, world, run):
    write(world / "q.jsonl", [{"prompt": "q", **row}])
    done = run("eval", "-m", "my-model", "--data", "q.jsonl")
    assert done.status == 1 and message in done.err


def test_kinds_of_data_are_not_mixed(world, fails):
    write(world / "q.jsonl", [{"prompt": "q", "choices": ["a", "b"], "answer": 0}])
    words = ["eval", "-m", "my-model", "--data", "q.jsonl"]
    assert "files of several kinds" in fails(*words, "--data", "play.txt")
    assert "has choice rows, but --exact-match needs" in fails(*words, "--exact-match")
