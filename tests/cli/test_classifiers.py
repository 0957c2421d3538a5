"""Sequence classifiers: logits and files of transformers and peft, and the commands for them."""

import json
import pathlib
import shutil
from functools import partial

import jax
import ml_dtypes
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models
from lora_jax.cli import classifiers, sources
from lora_jax.files import kinds
from lora_jax.files.disk import safetensors_file
from lora_jax.training import with_head
from tests.cli import files

pytestmark = pytest.mark.usefixtures("quick_compile")

MODELS = pathlib.Path(__file__).parents[1] / "models" / "fixtures"
RECORDED = pathlib.Path(__file__).parents[1] / "parity" / "peft" / "recorded" / "classifiers.npz"
STEMS = {
    **{"bert": "Bert", "llama": "Llama", "qwen2": "Qwen2"},
    **{"roberta": "Roberta", "modernbert": "ModernBert"},
}


def slow_of(*names):
    return [pytest.param(x, marks=pytest.mark.slow if x in names else ()) for x in STEMS]


@pytest.fixture(scope="module")
def recorded():
    with np.load(RECORDED) as file:
        return dict(file)


@pytest.fixture
def adapter(recorded, tmp_path):
    """Return a function that writes the adapter that peft wrote for a model."""

    def write(name):
        (tmp_path / "adapter").mkdir(exist_ok=True)
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            (tmp_path / "adapter" / file).write_bytes(recorded[f"{name}/{file}"].tobytes())
        return tmp_path / "adapter"

    return write


def logits(loaded, recorded, fn=lora.lora):
    mask = recorded["mask"]
    ids = recorded.get(f"{loaded.model.settings['model_type']}/ids", recorded["ids"])
    return np.asarray(jax.jit(fn(loaded.function(1)))(loaded.params, ids, mask))[:, 0]


@pytest.mark.parametrize("name", tuple(STEMS))
def test_the_logits_are_those_of_transformers_with_pefts_adapter(name, adapter, recorded):
    found = sources.find_model(str(MODELS / name))
    folder = adapter(name)
    assert classifiers.find(found, folder) == str(folder) and not classifiers.find(found, None)
    loaded = classifiers.load(found, folder)
    np.testing.assert_allclose(
        logits(loaded, recorded), recorded[f"{name}/logits"], rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("name", slow_of("roberta", "modernbert"))
def test_merged_it_is_the_classifier_that_transformers_writes(
    name, adapter, recorded, run, tmp_path
):
    base, out = MODELS / name, tmp_path / "merged"
    done = run("merge", "--model", base, "--adapter", adapter(name), "--out", out)
    assert (done.status, done.err) == (0, ""), done
    tensors, _ = safetensors_file.read(out / "model.safetensors")
    assert sorted(tensors) == recorded[f"{name}/names"].tolist()
    config = json.loads((out / "config.json").read_text())
    stem = STEMS[name]
    assert config["architectures"] == [f"{stem}ForSequenceClassification"]
    assert config["id2label"] == {"0": "0", "1": "1", "2": "2"}
    assert classifiers.find(sources.find_model(str(out)), None) == str(out)
    loaded = classifiers.load(sources.find_model(str(out)))
    np.testing.assert_allclose(
        logits(loaded, recorded, lambda fn: fn), recorded[f"{name}/logits"], rtol=2e-5, atol=2e-5
    )
    again = models.load(out)  # and `save` keeps the head
    models.save(tmp_path / "saved", again)
    copy, _ = safetensors_file.read(tmp_path / "saved" / "model.safetensors")
    assert {n: x.tobytes() for n, x in copy.items()} == {n: x.tobytes() for n, x in tensors.items()}


ROWS = [{"text": f"{word} {n}", "label": word} for n in range(5) for word in ("a", "b")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a function: kind -> (model, adapter, data) of a classifier trained by `train`."""
    from lora_jax.cli import main

    made = {}

    def train(kind, *more):
        if (kind, *more) not in made:
            folder = tmp_path_factory.mktemp(kind)
            write = files.model if kind == "llama" else partial(files.encoder, kind=kind)
            write(folder / "model")
            data = folder / "data.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
            words = ["train", "--model", folder / "model", "--data", data, "--out", folder / "run"]
            words += ["--task", "classification", "--steps", 12, "--lr", 5e-2, "--batch", 2]
            words += ["--length", 32, "--rank", 2, "--targets", "all-linear", "--eval", data, *more]
            assert main([str(word) for word in words]) == 0
            made[(kind, *more)] = folder
        return made[(kind, *more)]

    return train


HEADS = {
    "bert": {"classifier.weight", "classifier.bias"},
    "llama": {"score.weight"},
    "roberta": {f"classifier.{x}.{y}" for x in ("dense", "out_proj") for y in ("weight", "bias")},
    "modernbert": {
        *("classifier.weight", "classifier.bias"),
        *("head.dense.weight", "head.norm.weight"),
    },
}

#: What peft 0.21.2 loads: for this task it saves "classifier" and "score" whole.
SAVED = {
    **{"bert": ["classifier"], "llama": ["score"], "roberta": ["classifier"]},
    "modernbert": ["classifier", "head.dense", "head.norm"],
}


def words(command, folder, *more):
    return [command, "-m", folder / "model", "--adapter", folder / "run/adapter.safetensors", *more]


STACKED = ("--scan", "--remat", "full")
KINDS = [
    ("bert",),
    ("llama",),
    ("llama", "--scan"),
    ("bert", "--pooling", "mean"),
    ("modernbert", *STACKED),
]
OTHERS = [pytest.param((kind,), marks=pytest.mark.slow) for kind in ("roberta", "modernbert")]
SLOW_FROM_1 = [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])]


@pytest.mark.parametrize("kind", [*SLOW_FROM_1, *OTHERS], ids=lambda kind: "".join(kind))
def test_what_training_measured_is_what_eval_measures(kind, trained, run):
    folder = trained(*kind)
    layouts = lora.read_metadata(folder / "run/adapter.safetensors")["layouts"]
    assert not any(path.startswith("encoder/head") for path in layouts)
    last = json.loads((folder / "run/log.jsonl").read_text().splitlines()[-1])
    done = run(*words("eval", folder, "--data", folder / "data.jsonl", "--length", 32, "--json"))
    assert (done.status, done.err) == (0, ""), done
    found = json.loads(done.out)
    assert found["texts"] == 10
    assert found["accuracy"] == last["eval_accuracy"]
    # the logarithms of probabilities near 1 are rounded at 6e-8, whatever is left of them
    assert found["loss"] == pytest.approx(last["eval_loss"], rel=1e-4, abs=1.2e-7)
    hits = [tuple(map(int, one.split("/"))) for one in found["right of"].values()]
    assert sum(hit for hit, _ in hits) == round(10 * found["accuracy"])


@pytest.mark.parametrize(
    "kind",
    [
        "bert",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("llama", "roberta", "modernbert")),
    ],
)
def test_predictions_of_the_adapter_and_of_the_merged_model(kind, trained, run, tmp_path):
    """By `predict` on arguments, on a file of rows and on lines, packed or alone."""
    folder, out = trained(kind), tmp_path / "merged"
    assert run(*words("merge", folder, "--out", out)).status == 0
    texts = [row["text"] for row in ROWS]
    (tmp_path / "lines.txt").write_text("\n".join(texts) + "\n")
    adapted = run(*words("predict", folder, *texts, "--json"))
    assert (adapted.status, adapted.err) == (0, ""), adapted
    rows = [json.loads(line) for line in adapted.out.splitlines()]
    assert [row["text"] for row in rows] == texts
    for row in rows:
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
        assert sum(row["probabilities"].values()) == pytest.approx(1)
    for source in (tmp_path / "lines.txt", folder / "data.jsonl"):
        done = run("predict", "-m", out, "--data", source, "--json", "--batch", 1, "--length", 6)
        assert (done.status, done.err) == (0, ""), done
        merged = [json.loads(line) for line in done.out.splitlines()]
        assert [row["text"] for row in merged] == texts
        for one, other in zip(rows, merged, strict=True):
            assert other["label"] == one["label"]
            assert other["probabilities"] == pytest.approx(one["probabilities"], abs=1e-5)
    plain = run("predict", "-m", out, texts[0]).out
    label, probability = plain.split()[:2]
    assert label == rows[0]["label"] and plain.endswith(f"\t{texts[0]}\n")
    assert float(probability) == pytest.approx(rows[0]["probabilities"][label], abs=1e-4)


@pytest.mark.parametrize("kind", [*SLOW_FROM_1[::2], *OTHERS], ids=lambda kind: "".join(kind))
def test_converted_for_peft_it_predicts_the_same(kind, trained, run, tmp_path):
    """PEFT's file has the head in full, under transformers' name."""
    folder, out = trained(*kind), tmp_path / "peft"
    words = ["convert", folder / "run/adapter.safetensors", "--to", "peft", "--out", out]
    done = run(*words, "--model", folder / "model")
    assert (done.status, done.err) == (0, ""), done
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    names = HEADS[kind[0]]
    tensors, _ = safetensors_file.read(out / "adapter_model.safetensors")
    whole = {name.removeprefix("base_model.model.") for name in tensors if "lora_" not in name}
    assert whole == names and config["modules_to_save"] == SAVED[kind[0]]
    own = run("predict", "-m", folder / "model", "--adapter", folder / "run/adapter.safetensors",
              "a 1", "b 2", "--json").out  # fmt: skip
    found = run("predict", "-m", folder / "model", "--adapter", out, "a 1", "b 2", "--json").out
    for one, other in zip(own.splitlines(), found.splitlines(), strict=True):
        values = [[*json.loads(line)["probabilities"].values()] for line in (one, other)]
        assert values[0] == pytest.approx(values[1], abs=1e-5)


@pytest.mark.slow
def test_a_classifiers_base_in_bfloat16_keeps_its_dtype(trained, run, tmp_path):
    folder, out = trained("bert"), tmp_path / "merged"
    assert run(*words("merge", folder, "--out", out, "--dtype", "bfloat16")).status == 0
    tensors, _ = safetensors_file.read(out / "model.safetensors")
    assert {x.dtype for x in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    shutil.copytree(folder / "model", tmp_path / "half")
    half, metadata = safetensors_file.read(tmp_path / "half" / "model.safetensors")
    half = {name: x.astype(ml_dtypes.bfloat16) for name, x in half.items()}
    safetensors_file.write(tmp_path / "half" / "model.safetensors", half, metadata)
    data = folder / "data.jsonl"
    train = ["train", "--model", tmp_path / "half", "--data", data, "--out", tmp_path / "run"]
    more = ["--task", "classification", "--steps", 2, "--length", 32, "--rank", 2]
    assert run(*train, *more).status == 0
    adapter = tmp_path / "run" / "adapter.safetensors"
    done = run("merge", "-m", tmp_path / "half", "--adapter", adapter, "--out", tmp_path / "small")
    assert done.status == 0, done
    tensors, _ = safetensors_file.read(tmp_path / "small" / "model.safetensors")
    wide = {name for name, x in tensors.items() if x.dtype == np.float32}
    assert wide == {"classifier.weight", "classifier.bias"}  # the base has none


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS[::3], ids=lambda kind: "".join(kind))
def test_other_commands_say_what_it_is(kind, trained, fails):
    folder = trained(*kind)
    said = fails(*words("generate", folder, "--prompt", "a"))
    assert "adapter.safetensors: is a sequence classifier" in said and "lora-jax predict" in said
    if "mean" in kind:
        said = fails(*words("merge", folder, "--out", folder / "merged"))
        assert "reads the mean" in said and "lora-jax predict" in said


def test_failures(trained, fails, tmp_path):
    folder = trained("bert")
    base = ["predict", "-m", folder / "model"]
    assert "give either texts or --data" in fails(*base, status=2)
    assert "give either texts or --data" in fails(*base, "x", "--data", "y", status=2)
    assert "is not a sequence classifier; train one" in fails(*base, "a")
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"prompt": "a", "completion": "b"}\n')
    assert "has completion rows; to classify" in fails(*words("predict", folder, "--data", chat))
    assert "completion rows, but the accuracy" in fails(*words("eval", folder, "--data", chat))
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "a", "label": "c"}\n')
    said = fails(*words("eval", folder, "--data", other))
    assert "labels that the classifier does not have (it has a, b): line 1: the label 'c'" in said
    assert "must be from 2 to" in fails(*words("predict", folder, "a", "--length", 100_000))
    assert "has no loss" in fails("eval", "-m", folder / "model", "--data", other)


def test_heads_for_other_tasks_are_not_taken_for_classifiers_of_texts(adapter, fails, tmp_path):
    """PEFT calls the head for labels of tokens "classifier" too."""
    folder = adapter("bert")
    config = json.loads((folder / "adapter_config.json").read_text())
    for task in ("TOKEN_CLS", "QUESTION_ANS"):
        (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": task}))
        for command in (["predict", "a"], ["merge", "--out", tmp_path / "out"]):
            said = fails(*command, "--model", MODELS / "bert", "--adapter", folder)
            assert f"has a head for the task {task}; of tasks with such a head only" in said
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors, _ = safetensors_file.read(folder / "adapter_model.safetensors")
    tensors = {name: x for name, x in tensors.items() if "classifier" not in name}
    safetensors_file.write(folder / "adapter_model.safetensors", tensors)
    files.encoder(tmp_path / "model")
    words = ["--model", tmp_path / "model", "--adapter", folder]
    assert "has no classifier.weight, a classifier's head" in fails("predict", "a", *words)
    assert "is a sequence classifier" in fails("generate", "--prompt", "a", *words)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"problem_type": "multi_label_classification"}, "problem_type multi_label_classification"),
        ({"problem_type": "regression"}, "problem_type regression with num_labels 3"),
    ],
)
def test_heads_that_do_not_choose_one_label_are_refused(
    change, said, adapter, run, fails, tmp_path
):
    out = tmp_path / "merged"
    words = ["merge", "--model", MODELS / "llama", "--adapter", adapter("llama"), "--out", out]
    assert run(*words).status == 0
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | change))
    files.model(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "tokenizer.json", out)
    assert said in fails("predict", "a", "--model", out)


def test_integers_are_labels_or_numbers_of_classes(trained, run, tmp_path):
    folder = trained("bert")
    by_name = folder / "data.jsonl"
    by_number = tmp_path / "numbers.jsonl"
    rows = [{"text": row["text"], "label": "ab".index(row["label"])} for row in ROWS]
    by_number.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, other = (run(*words("eval", folder, "--data", x)).out for x in (by_name, by_number))
    assert one == other and "accuracy" in one


@pytest.mark.slow
def test_an_older_file(tmp_path, run):
    """`train` once wrote a head on the mean, with a bias, without a name of the pooling.

    "head" also named a decoder's own head, which was trained although nothing uses it.
    """
    files.model(tmp_path / "model")
    base = models.load(tmp_path / "model")
    hidden = lambda *inputs: base.apply(*inputs, method="hidden")
    apply, params = with_head(hidden, base.params, files.WIDTH, 2, 1, seed=3)
    config = lora.LoraConfig(rank=2, targets=["query"], train=["head"])
    params = lora.init(jax.random.key(0), params, config)
    lora.save(tmp_path / "a.safetensors", params, {"labels": ["no", "yes"], "model": "x"})
    assert "encoder/head/kernel" in lora.read_metadata(tmp_path / "a.safetensors")["layouts"]
    done = run("predict", "-m", tmp_path / "model", "--adapter", tmp_path / "a.safetensors", "hey",
               "--json")  # fmt: skip
    assert done.status == 0, done
    ids = np.array([sources.tokenizer_of(kinds.detect(tmp_path / "model")).encode("hey")])
    wanted = jax.nn.softmax(lora.lora(apply)(params, ids, np.ones_like(ids))[0, 0])
    found = json.loads(done.out)["probabilities"]
    assert [found["no"], found["yes"]] == pytest.approx(wanted.tolist(), abs=1e-5)
