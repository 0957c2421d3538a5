"""The data of `lora-jax train`: templates, vocabularies, and what is said about them."""

import datetime
import json

import pytest

pytest.importorskip("typer")

from lora_jax.training import run_record
from tests.cli import files

pytestmark = pytest.mark.usefixtures("quick_compile")

SMALL = ("--length", 48, "--batch", 2, "--rank", 2, "--targets", "q_proj", "--steps", 1)
chat = lambda asked, said: {
    "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
}
ROWS = [chat(f"Say {i}", str(i)) for i in range(4)]


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.model(tmp_path / "my-model")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def words(*more):
    return ["train", "--model", "my-model", "--data", "d.jsonl", "--out", "run", *SMALL, *more]


def set_template(world, template):
    (world / "my-model" / "chat_template.jinja").write_text(template)


def test_a_run_of_yesterday_resumes_today(world, run, fails, monkeypatch):
    set_template(
        world,
        "<s>{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}</s>{% endfor %}",
    )
    with monkeypatch.context() as patch:
        long_ago = datetime.datetime(2020, 2, 3, 4, 5, 6)
        patch.setattr(run_record, "started", lambda directory, resume: long_ago)
        assert run(*words()).status == 0
    assert run(*words("--resume")).status == 0
    record = json.loads((world / "run" / "run.json").read_text())
    assert record["started"] == "2020-02-03T04:05:06"
    (world / "run" / "run.json").write_text(json.dumps(record | {"started": "2020-02-04"}))
    assert "the training data is different" in fails(*words("--resume"))


def test_a_token_beyond_the_vocabulary(world, run, fails):
    """The tokenizer has one token more than the model, which only one row uses."""
    path = world / "my-model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    added = dict(tokenizer["added_tokens"][-1], id=260, content="<tool>")
    tokenizer["added_tokens"] += [dict(added, id=259, content="<other>"), added]
    path.write_text(json.dumps(tokenizer))
    assert run(*words()).status == 0
    rows = [*ROWS[:2], chat("Hi", "<tool>")]
    (world / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    error = fails(*words("--out", "other"))
    assert "d.jsonl, line 3: the token '<tool>' (260) is beyond the model's vocabulary" in error
    assert not (world / "other").exists()


def test_no_stop_token_is_said_once(world, run):
    set_template(
        world,
        "{% for m in messages %}{% if not loop.first %}</s>{% endif %}<s>{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}</s><s>{% endif %}",
    )
    done = run(*words("--eval-split", 0.5))
    assert done.status == 0, done.err
    assert done.err.count("no stop token is trained on") == 1
