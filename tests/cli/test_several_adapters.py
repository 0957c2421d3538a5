"""Several adapters at one path: each of them says what its PEFT directory says."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models, peft
from lora_jax.cli.jobs import generate_file
from lora_jax.files import kinds, several
from lora_jax.training.errors import DataError
from tests.cli.test_generate_many import alone, world

pytestmark = pytest.mark.usefixtures("quick_compile")
__all__ = ["world"]

WORDS = ("generate", "--model", "my-model", "--max-tokens", 5)
NAMES = {"law": "my-adapter", "two": "other"}


@pytest.fixture
def collected(world):
    """Write the two adapters of PEFT as a stack in both forms, and as a sweep leaves them."""
    model = models.load("my-model")
    every = [peft.load(path, model.params, model.naming) for path in NAMES.values()]
    stack = lora.stack(every)
    lora.save("all.safetensors", stack, base=model.params, names=[*NAMES])
    lora.save("all", stack, base=model.params, names=[*NAMES])
    for name, path in NAMES.items():
        shutil.copytree(path, world / "swept" / name / "adapter")
    runs = [{"name": name, "adapter": f"swept/{name}/adapter"} for name in ("two", "law")]
    runs.append({"name": "lost", "adapter": None})
    (world / "swept" / "results.json").write_text(json.dumps({"best": "two", "runs": runs}))
    return world


@pytest.mark.slow
def test_rows_name_adapters_of_a_stack(collected, run):
    """In the file's order, in batches of two, whose rows have different adapters."""
    rows = [
        {"id": 0, "prompt": "Hi", "adapter": "two"},
        {"id": 1, "prompt": "Hello there, this is a longer one", "adapter": "law"},
        {"id": 2, "prompt": "Hi", "adapter": "base"},
        {"id": 3, "prompt": "Hi"},
    ]
    (collected / "p.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    given = ("--adapter", "all.safetensors", "--adapter", "base")
    done = run(*WORDS, *given, "--prompts", "p.jsonl", "--batch", 2)
    assert (done.status, done.err) == (0, "")
    found = [json.loads(line) for line in done.out.splitlines()]
    answered = [(row["id"], row["adapter"].rpartition("/")[2]) for row in found]
    order = [(0, "two"), (1, "law"), (2, "base"), (3, "law"), (3, "two"), (3, "base")]
    assert answered == order
    asked = list(dict.fromkeys((name, rows[i]["prompt"]) for i, name in order))
    words = [x for name, _ in asked for x in ("--adapter", NAMES.get(name, "base"))]
    words += [x for _, text in asked for x in ("--prompt", text)]
    texts = run(*WORDS, *words).out.split("\n\n")
    wanted = {one: text.partition("\n")[2] for one, text in zip(asked, texts, strict=False)}
    assert len({*wanted.values()}) == 4
    assert [row["generated"] for row in found] == [
        wanted[name, rows[i]["prompt"]] for i, name in order
    ]


def test_where_each_lies(collected):
    model = models.load("my-model")
    for path in ("all.safetensors", "all", "swept"):
        found = several.adapters_at(collected / path)
        assert [*found] == (["two", "law"] if path == "swept" else ["law", "two"])
        for name, place in found.items():
            there = kinds.adapter(place)
            load = lora.load if there.kind == kinds.NATIVE else peft.load
            more = () if there.kind == kinds.NATIVE else (model.naming,)
            mine = jax.tree.leaves(load(there.path, model.params, *more))
            want = jax.tree.leaves(peft.load(NAMES[name], model.params, model.naming))
            assert all(map(np.array_equal, mine, want)) and len(mine) == len(want)
    assert several.adapters_at(collected / "my-adapter") == {}
    assert several.adapters_at(collected / "my-model") == {}


@pytest.mark.slow
@pytest.mark.parametrize("path", ["all.safetensors", "all", "swept"])
def test_each_command_takes_them(path, collected, run):
    done = run(*WORDS, "--adapter", f"x={path}", "--prompt", "Hi")
    assert done.status == 0, done.err
    for part, name in zip(
        done.out.split("\n\n"), several.adapters_at(collected / path), strict=False
    ):
        assert part == f"[x/{name}] Hi\n{alone(run, NAMES[name], 'Hi')}"
    (collected / "lines.txt").write_text("Hi\n\nHello\n")
    done = run(*WORDS, "--adapter", path, "--prompts", "lines.txt")
    assert [json.loads(x)["prompt"] for x in done.out.splitlines()] == ["Hi", "Hello"] * 2
    table = run("eval", "-m", "my-model", "--adapter", path, "--data", "held-out.jsonl").out
    single = run(
        "eval", "-m", "my-model", "--adapter", "other", "--data", "held-out.jsonl", "--json"
    )
    row = next(line for line in table.splitlines() if f"{path}/two" in line)
    assert f"{json.loads(single.out)['loss']:.4f}" in row


def test_whom_a_row_asks():
    """By its name or by the last part of its path, in the file's order; others are refused."""
    rows = [{"prompt": "a"}, {"prompt": "b", "adapter": "two"}, {"prompt": "c", "adapter": "none"}]
    prompts = [generate_file._prompt(f"line {i}", row) for i, row in enumerate(rows)]
    chosen = {"law": Path("x/law"), "runs/two": Path("runs/two"), "base": None}
    asked = generate_file._asked(Path("f"), prompts, chosen)
    assert [(one.prompt.text, one.adapter) for one in asked] == [
        *(("a", name) for name in chosen),
        *(("b", "runs/two"), ("c", "base")),
    ]
    of_all = generate_file._asked(Path("f"), prompts[:1] * 2, chosen)
    assert [one.adapter for one in of_all] == ["law", "law", "runs/two", "runs/two", "base", "base"]
    del chosen["base"]
    with pytest.raises(DataError, match=r"there are law, runs/two:\n *line 2: none"):
        generate_file._asked(Path("f"), prompts, chosen)


def test_mistakes(collected, fails):
    one = ("eval", "-m", "my-model", "--data", "held-out.jsonl", "--adapter")
    assert "it has law, two" in fails(*one, "all.safetensors/three")
    assert "one adapter, not a stack" in fails(*one, "adapter.safetensors/x")
    merge = ("merge", "-m", "my-model", "--out", "m", "--adapter")
    assert "give one of them: all.safetensors/law" in fails(*merge, "all.safetensors")
    assert "give one of them: all/law.safetensors" in fails(*merge, "all")
    assert "give one of them: swept/two" in fails(*merge, "swept")
    given = ("--adapter", "my-adapter", "--adapter", "my-adapter=other", "--prompt", "Hi")
    assert "the name my-adapter is already used for my-adapter" in fails(*WORDS, *given)
    (collected / "p.jsonl").write_text('{"prompt": "Hi", "adapter": "three"}\n')
    message = fails(*WORDS, "--adapter", "all", "--prompts", "p.jsonl")
    assert "there are all/law.safetensors, all/two.safetensors: line 1: three" in message
    (collected / "swept" / "results.json").write_text(
        '{"best": "a", "runs": [{"name": "../a", "adapter": "x"}]}'
    )
    assert "'../a' is not the name of a file" in fails(*merge, "swept")
