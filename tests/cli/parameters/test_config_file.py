"""`--config FILE.yaml` and `--dump-config`: a run in a file, checked as words are."""

import pytest

pytest.importorskip("typer")

import yaml
from typer.main import get_command

from lora_jax.cli import app
from lora_jax.cli.commands.train import _is_given, resume_command
from lora_jax.cli.parameters import config_file

MINIMAL = "model: tiny\ndata: [a.jsonl, b.jsonl]\nout: run\n"


def write(folder, text, name="run.yaml"):
    path = folder / name
    path.write_text(text)
    return path


def parsed(words, command="train"):
    """Return the context of a command that is parsed and not run."""
    found = get_command(app.app).commands[command]
    return found.make_context(f"lora-jax {command}", [str(word) for word in words])


def test_the_file_gives_options_and_words_override_them(tmp_path):
    path = write(tmp_path, MINIMAL + "lr: 1e-3\neval_split: 0.25\nrank: 4\nshuffle: no\nalpha:\n")
    values = parsed(["--config", path, "--rank", "2", "--data", "c.jsonl"]).params
    assert [values[n] for n in ("model", "rank", "lr", "eval_split")] == ["tiny", 2, 1e-3, 0.25]
    assert [str(x) for x in values["data"]] == ["c.jsonl"]
    assert values["shuffle"] is False and values["alpha"] is None and values["batch"] == 4
    assert [str(x) for x in parsed(["--config", path]).params["data"]] == ["a.jsonl", "b.jsonl"]
    # as on the command line, where YAML would see 63, 8 and a date
    path = write(tmp_path, MINIMAL + "layers: 1:3\nrank: 010\nbase_name: 2026-01-01\n")
    values = parsed(["--config", path]).params
    assert [values[n] for n in ("layers", "rank", "base_name")] == ["1:3", 10, "2026-01-01"]


#: A line of a file -> what the error says after the file's name.
REFUSED = {
    "learning_rate: 1e-3": "learning_rate is not an option; use lr",
    "lora_r: 8": "lora_r is not an option; use rank",
    "micro_batch_size: 2": "micro_batch_size is not an option; use batch",
    "iters: 100": "iters is not an option; use steps",
    "rnk: 8": "rnk is not an option; perhaps rank",
    "frobnicate: 8": "frobnicate is not an option; the help lists all of them",
    "rank: many": "rank must be an integer, got many",
    "rank: 0": "rank must be at least 1, got 0",
    "rank: true": "rank must not be true; put text into quotes",
    "rank: [1, 2]": "rank must be a single value",
    "rank: {a: 2}": "rank must be a text, a number",
    "eval_split: 0.95": "eval-split must be at most 0.9, got 0.95",
    "eval: [x.jsonl, null]": "eval must be a text, a number",
    "dora: 1": "dora must be true or false, got 1",
    "bias: some": "bias 'some' is not one of 'none', 'all', 'adapted'",
    "exclude: no": "exclude must not be false",
    "config: other.yaml": "config is only for the command line",
    "dump-config: true": "dump-config is only for the command line",
    "lr: 1\nlr: 2": "lr is there twice",
    "eval_split: 0.1\neval-split: 0.2": "eval-split is there twice",
    "layers: -4:": "is not valid YAML (mapping values are not allowed here in line 1)",
    "rank: [": "is not valid YAML",
    "- rank": "must contain lines such as",
    "rank: !!python/object:os.system x": "is not valid YAML",
    "lr: 1\n? [a]\n: 1": "a key in line 2 is not the name of an option",
    "dora: !!bool x": "is not valid YAML",
    "rank: !!int ''": "rank must be an integer",
    "rank: 0x10": "rank must be an integer, got 0x10",
    "\x00": "is not valid YAML",
    "[" * 1500: "is not valid YAML",
    "#" * (2 << 20): "is too large",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:30])
def test_refused_in_one_line_that_names_the_file(text, tmp_path, fails):
    path = write(tmp_path, text)
    words = ["--model", "tiny", "--data", "a.txt", "--out", tmp_path / "out"]
    error = fails("train", "--config", path, *words, status=2)
    assert error.startswith(f"error: {path}: {REFUSED[text]}"), error
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_read(tmp_path, fails):
    path = tmp_path / "none.yaml"
    assert f"{path}: No such file" in fails("train", "--config", path, status=2)
    path.write_bytes(b"rank: \xff")
    assert f"{path}: is not valid YAML" in fails("train", "--config", path, status=2)
    assert "Missing option '--model'" in fails("train", "--config", write(tmp_path, ""), status=2)


ODD = ["--targets", "q_proj, v", "--exclude", "no", "--layers", "-4:", "--add-token", "<é\x7f: #>"]


WORDS = {
    "generate": ("--model", "m", "--prompt", "é", "--stop", "x", "--stop", "y", "--top-p", "0.5"),
    "eval": ("--model", "m", "--data", "d", "--exact-match", "--no-strict"),
    "serve": ("--model", "m", "--adapter", "a=b", "--stop-after", "2.5", "--no-warm-up"),
    "merge": ("--model", "m", "--adapter", "a", "--out", "o", "--rename", "a=", "--force"),
    "convert": ("a", "--to", "peft", "--out", "o", "--alpha", "3"),
    "combine": ("a", "b", "--weights", "1,-0.5", "--out", "o", "--no-exact"),
}


@pytest.mark.parametrize("command", WORDS)
def test_every_command_reads_what_it_dumps(command, tmp_path, run):
    printed = run(command, *WORDS[command], "--dump-config")
    assert printed.status == 0 and not printed.err
    path = write(tmp_path, printed.out)
    given, again = (parsed(w, command).params for w in (WORDS[command], ["--config", path]))
    assert {**again, "config": None} == given


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_what_is_dumped_reads_back_to_the_same(command, tmp_path, run):
    train = command == "train"
    words = ["--model", "1e5", "--data", "a b.txt", "--data", "c=2", "--out", tmp_path, "--dora"]
    words += [
        "--eval-split",
        "0.1",
        "--no-shuffle",
        "--memory",
        "3",
        *ODD[: 8 if command == "train" else 6],
    ]
    words += ["--lr", "3e-5"] if train else ["--lrs", "1e-4,3e-5", "--ranks", "2"]
    printed = run(command, *words, "--dump-config")
    assert printed.status == 0 and not printed.err and not [*tmp_path.iterdir()]
    path = write(tmp_path, printed.out)
    assert run(command, "--config", path, "--dump-config").out == printed.out
    given, again = parsed(words, command).params, parsed(["--config", path], command).params
    assert {**again, "config": None} == given and again["config"] == path
    assert yaml.safe_load(printed.out)["memory"] == 3.0


def test_every_option_can_be_in_a_file(tmp_path):
    context = parsed(["--model", "m", "--data", "d", "--out", "o"])
    read = 0
    for parameter in context.command.params:
        value = context.params.get(parameter.name)
        if parameter.name in ("help", "config", "dump_config") or value in (None, []):
            continue
        text = yaml.safe_dump({parameter.name: value if parameter.is_flag else str(value)})
        if parameter.name == "data":
            text = "data: [d]"
        found = config_file.read(context, write(tmp_path, text.replace("held_out", "eval")))
        assert [*found] == [parameter.name]
        read += 1
    assert read > 30


def test_the_command_that_resumes_names_the_file_and_what_overrides_it(tmp_path):
    path = write(tmp_path, MINIMAL + "rank: 4\n")
    context = parsed(["--config", path, "--rank", "8", "--lr", "2e-4", "--seed", "3"])
    assert resume_command(context) == f"lora-jax train --rank 8 --seed 3 --config {path} --resume"
    with_default = parsed(["--config", path, "--rank", "4"])
    assert _is_given(with_default, "rank") and not _is_given(with_default, "alpha")


def test_options_that_exclude_each_other_do_so_in_a_file(tmp_path, fails):
    path = write(tmp_path, MINIMAL + "steps: 3\nepochs: 2\n")
    assert "give either --steps or --epochs" in fails("train", "--config", path, status=2)
    path = write(tmp_path, MINIMAL + "adapter: x\nrank: 4\n")
    assert "leave out --rank" in fails("train", "--config", path, status=2)
