"""`generate` with several adapters and prompts: each says what it says alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models, peft
from tests.cli import files

pytestmark = pytest.mark.usefixtures("quick_compile")

WORDS = ("generate", "--model", "my-model", "--max-tokens", 5)


@pytest.fixture
def world(tmp_path, monkeypatch):
    files.everything(tmp_path)
    files.peft(tmp_path / "other", seed=3)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def several(run, *rows, more=(), prompts=None):
    """Return what is printed for (adapter, prompt)s, as (label, text)s."""
    words = [x for adapter, _ in rows for x in ("--adapter", adapter)]
    words += [x for text in prompts or [p for _, p in rows] for x in ("--prompt", text)]
    done = run(*WORDS, *words, *more)
    assert (done.status, done.err) == (0, "")
    parts = done.out.split("\n\n")
    assert parts.pop() == ""
    return [part.split("\n", 1) for part in parts]


def alone(run, adapter, prompt, *more):
    words = [] if adapter == "base" else ["--adapter", adapter]
    return run(*WORDS, *words, "--prompt", prompt, *more).out.removesuffix("\n")


def test_each_adapter_answers_its_own_prompt(world, run):
    """Two formats and the base, with prompts of two lengths."""
    rows = [("my-mlx-adapter", "Hi"), ("base", "Hello there"), ("other", "Hi")]
    wanted = [[f"[{adapter}] {text}", alone(run, adapter, text)] for adapter, text in rows]
    assert len({text for _, text in wanted}) == 3
    assert several(run, *rows) == wanted


@pytest.mark.slow
def test_one_prompt_is_for_all_adapters(world, run):
    rows = [(adapter, "Hi") for adapter in ("other", "base", "my-adapter")]
    wanted = [[f"[{adapter}] Hi", alone(run, adapter, "Hi")] for adapter, _ in rows]
    assert several(run, *rows, prompts=["Hi"]) == wanted


@pytest.mark.slow
def test_one_adapter_or_none_continues_several_prompts(world, run):
    texts = ["Hi", "Hello there"]
    for adapter in ("my-adapter", "base"):
        words = [] if adapter == "base" else ["--adapter", adapter]
        done = run(*WORDS, *words, "--prompt", texts[0], "--prompt", texts[1], "--stop", "zz")
        parts = [f"[{adapter}] {text}\n{alone(run, adapter, text)}\n\n" for text in texts]
        assert done.out == "".join(parts)


@pytest.mark.slow
def test_a_directory_called_base_is_an_adapter(world, run):
    (world / "base").symlink_to(world / "other")
    assert alone(run, "./base", "Hi") == run(*WORDS, "--adapter", "base", "--prompt", "Hi").out[:-1]


def test_what_does_not_go_together(world, fails):
    two = ("--adapter", "my-adapter", "--adapter", "other")
    three = [x for text in "abc" for x in ("--prompt", text)]
    assert "2 --adapter and 3 --prompt: give one prompt for each" in fails(
        *WORDS, *two, *three, status=2
    )
    assert "prompt is empty" in fails(*WORDS, *two, "--prompt", "Hi", "--prompt", "")
    assert "none: no such file" in fails(*WORDS, *two[:2], "--adapter", "none", "--prompt", "Hi")
    assert "is a sequence classifier" in fails(
        *WORDS, *two[:2], "--adapter", "my-classifier", "--prompt", "Hi"
    )
    long = ("--prompt", "Hi", "--prompt", "x" * 64)
    assert "64 tokens, but the model has only 64 positions" in fails(*WORDS, *two, *long)
    grown = np.ones((300, files.WIDTH), np.float32)
    tables = {f"base_model.model.{x}.weight": grown for x in ("model.embed_tokens", "lm_head")}
    files.peft(world / "grown", extra=tables)
    error = fails(*WORDS, *two[:2], "--adapter", "grown", "--prompt", "Hi")
    assert "grown: changes the model's vocabulary or its output head" in error


@pytest.mark.slow
def test_adapters_for_stacked_layers_and_for_single_ones(model, tmp_path, run, fails, monkeypatch):
    """One for stacked layers and one of PEFT share a batch; native ones of both kinds do not."""
    monkeypatch.chdir(tmp_path)
    for name, scan, target in [("stacked", True, "query"), ("single", False, "value")]:
        base = models.load(model, scan=scan)
        config = lora.LoraConfig(rank=2, alpha=64, targets=[target])
        params = lora.init(
            jax.random.key(0), base.params, config, base.apply, jnp.ones((1, 4), int)
        )
        overlay = jax.tree.map(lambda x: x + 0.5 if x.ndim > 1 else x, lora.split(params)[1])
        lora.save(f"{name}.safetensors", overlay, base=base.params, config=config)
        peft.save(name, lora.join(base.params, overlay), base.naming, config=config)
    words = ("generate", "--model", model, "--max-tokens", 5, "--prompt", "Hi")
    found = run(*words, "--adapter", "stacked.safetensors", "--adapter", "single").out
    one, other = (run(*words, "--adapter", x).out for x in ("stacked.safetensors", "single"))
    assert one != other
    assert found == f"[stacked.safetensors] Hi\n{one}\n[single] Hi\n{other}\n"
    error = fails(*words, "--adapter", "stacked.safetensors", "--adapter", "single.safetensors")
    assert (
        "stacked.safetensors is for stacked layers and single.safetensors for single ones" in error
    )
