"""`generate --prompts`: each row of a file gets what its prompt alone gets."""

import json

import pytest

from lora_jax.models.text.byte_tokenizer import byte_tokenizer
from tests.cli import reciter
from tests.cli.test_generate_many import world

pytestmark = pytest.mark.usefixtures("quick_compile")
__all__ = ["world"]

WORDS = ("generate", "--model", "my-model", "--max-tokens", 5)
PROMPTS = ["Hi", "Hello there, this is a longer one", "A", "To be", "What?"]


def test_rows_keep_their_keys(tmp_path, run, monkeypatch):
    """Of a model that continues a letter with the rest of the alphabet, and then ends."""
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_tokenizer()
    reciter.model(tmp_path / "m", tokenizer, "abcdefghij", [tokenizer.eos_id])
    rows = [{"id": n, "prompt": text} for n, text in enumerate(("a", "XYZd", "h"))]
    (tmp_path / "p.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    done = run("generate", "-m", "m", "--prompts", "p.jsonl", "--batch", 2, "--max-tokens", 10)
    assert (done.status, done.err) == (0, "")
    said = ["bcdefghij", "efghij", "ij"]
    assert [json.loads(line) for line in done.out.splitlines()] == [
        {**row, "generated": text} for row, text in zip(rows, said, strict=True)
    ]


@pytest.mark.slow
def test_rows_get_what_they_get_alone(world, run):
    """Prompts of several lengths in batches of two, for an adapter and the base."""
    rows = [{"id": i, "prompt": text, "completion": "mine"} for i, text in enumerate(PROMPTS)]
    (world / "p.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    chosen = ("--adapter", "other", "--adapter", "base")
    words = (*WORDS, *chosen, "--prompts", "p.jsonl", "--batch", 2, "--out", "o.jsonl")
    done = run(*words)
    assert (done.status, done.out, done.err) == (0, "", "")
    found = [json.loads(line) for line in (world / "o.jsonl").read_text().splitlines()]
    assert [row["adapter"] for row in found] == ["other"] * 5 + ["base"] * 5
    assert [{k: row[k] for k in ("id", "prompt", "completion")} for row in found] == rows * 2
    for i, more in ((1, chosen[:2]), (4, chosen[:2]), (6, ()), (9, ())):
        text = run(*WORDS, *more, "--prompt", found[i]["prompt"]).out.removesuffix("\n")
        assert found[i]["generated"] == text
    again = run(*words)
    assert again.status == 1 and "o.jsonl: exists already; add --force" in again.err


@pytest.mark.slow
def test_messages_and_several_adapters(world, run):
    """A row of messages is what --chat makes of it; a stack answers as each adapter does."""
    turns = {"messages": [{"role": "user", "content": "Hi"}]}
    (world / "p.jsonl").write_text(f"{json.dumps(turns)}\n{json.dumps({'prompt': 'Hi'})}\n")
    adapters = ("my-adapter", "other")
    words = [x for adapter in adapters for x in ("--adapter", adapter)]
    done = run(*WORDS, *words, "--prompts", "p.jsonl")
    found = [json.loads(line)["generated"] for line in done.out.splitlines()]
    for i, adapter in enumerate(adapters):
        for j, chat in enumerate((["--chat"], [])):
            alone = run(*WORDS, "--adapter", adapter, "--prompt", "Hi", *chat).out
            assert found[2 * i + j] == alone.removesuffix("\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "Hi"}', 'line 2: must have a "prompt", a text, or "messages"'),
        ('{"prompt": ""}', 'line 2: must have a "prompt"'),
        ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
        ('{"messages": []}', "line 2: messages is an empty list"),
        ("[1]", "line 2: a JSON list, not an object"),
        ("{", "line 2: not valid JSON"),
        (json.dumps({"prompt": "x" * 70}), "has 70 tokens, but the model has only 64 positions"),
    ],
)
def test_rows_that_are_refused(line, message, world, run):
    (world / "p.jsonl").write_text(f'{{"prompt": "fine"}}\n{line}\n')
    done = run(*WORDS, "--prompts", "p.jsonl")
    assert done.status == 1 and done.out == "" and message in done.err


def test_options_that_exclude_each_other(world, fails):
    files_of = ("--prompts", "held-out.jsonl")
    assert "not both" in fails(*WORDS, *files_of, "--prompt", "Hi", status=2)
    assert "are for --prompts" in fails(*WORDS, "--prompt", "Hi", "--out", "o.jsonl", status=2)
    assert "takes a .jsonl file" in fails(*WORDS, "--prompts", "my-model")
