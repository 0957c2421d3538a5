"""Files of image generators on the command line: convert, combine, inspect."""

import json

import numpy as np
import pytest

from lora_jax.files.contained_factors import read_factors
from lora_jax.files.disk import safetensors_file
from tests.cli import files

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return files.kohya(tmp_path / "style.safetensors")


def convert(run, *words):
    done = run("convert", *words)
    assert (done.status, done.err) == (0, "")


def test_kohya_to_directories_of_peft_and_back(world, tmp_path, run):
    convert(run, "style.safetensors", "--to", "peft", "--out", "style")
    unet, text = (read_factors(tmp_path / "style" / x) for x in ("unet", "text_encoder"))
    assert [one.module for one in text.factors] == ["text_model.encoder.layers.3.self_attn.q_proj"]
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert {one.module: one.a.shape for one in unet.factors} == {
        "conv_out": (320 * 9, 1),
        f"{block}.attn1.to_q": (320, 1),  # LoHa of rank 1·1
        f"{block}.attn2.to_k": (768, 2),
    }
    got = {}
    for name, component in (("u", "unet"), ("t", "text_encoder")):
        convert(run, f"style/{component}", "--to", "kohya", "--out", f"{name}.safetensors")
        tensors, header = safetensors_file.read(f"{name}.safetensors")
        got |= tensors
        assert header["ss_base_model_version"] == "sd_v1"
    convert(run, "style", "--to", "kohya", "--out", "both.safetensors")
    both, _ = safetensors_file.read("both.safetensors")
    assert both.keys() == got.keys() and all((both[name] == x).all() for name, x in got.items())
    assert run("combine", "style", "style.safetensors", "--out", "twice").status == 0
    assert {one.a.shape[1] for one in read_factors(tmp_path / "twice" / "unet").factors} == {2, 4}
    told = run("inspect", "style")
    assert told.status == 1 and "give one of style/unet, style/text_encoder" in told.err
    plain = {name: x for name, x in world.items() if ".hada" not in name}
    for name, x in plain.items():
        np.testing.assert_array_equal(got.pop(name), x)
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    assert got.keys() == {f"{key}.{x}" for x in ("lora_down.weight", "lora_up.weight", "alpha")}
    w = [world[f"{key}.hada_{x}"] for x in ("w1_a", "w1_b", "w2_a", "w2_b")]
    np.testing.assert_allclose(
        got[f"{key}.lora_up.weight"] @ got[f"{key}.lora_down.weight"],
        (w[0] @ w[1]) * (w[2] @ w[3]),
        rtol=1e-5,
        atol=1e-5,
    )


def test_diffusers_and_kohya_combined_are_nothing(world, run):
    convert(run, "style.safetensors", "--to", "diffusers", "--out", "d.safetensors")
    done = run("inspect", "d.safetensors", "--json")
    assert json.loads(done.out)["description"] == "diffusers adapter"
    both = ["style.safetensors", "d.safetensors"]
    done = run("combine", *both, "--weights", "1,-1", "--out", "c.safetensors")
    assert done.status == 0 and "kohya adapter" in done.out
    for name, x in safetensors_file.read("c.safetensors")[0].items():
        if name.endswith("lora_up.weight"):
            down = safetensors_file.read("c.safetensors")[0][name.replace("_up", "_down")]
            assert abs(np.tensordot(x.reshape(len(x), -1), down, 1)).max() < 1e-4


def test_sdxl_has_the_original_names(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0).normal
    names = {
        "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q": (640, 640),
        "text_encoder_2.text_projection": (1280, 1280),
    }
    tensors = {}
    for name, (out, ins) in names.items():
        tensors[f"{name}.lora_A.weight"] = draw(size=(1, ins)).astype("float32")
        tensors[f"{name}.lora_B.weight"] = draw(size=(out, 1)).astype("float32")
    safetensors_file.write("d.safetensors", tensors)
    convert(run, "d.safetensors", "--to", "kohya", "--out", "xl.safetensors")
    found, header = safetensors_file.read("xl.safetensors")
    assert {name.partition(".")[0] for name in found} == {
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q",
        "lora_te2_text_projection",
    }
    assert header["ss_base_model_version"] == "sdxl_base_v1-0"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convert", "style.safetensors", "--to", "kohya"], "is already a kohya adapter"),
        (["convert", "style.safetensors", "--to", "mlx"], "is for an image generator, and becomes"),
        (["convert", "whole.safetensors", "--to", "peft"], "pass full_rank=16 (--full-rank 16)"),
        (["convert", "other.safetensors", "--to", "peft"], "is a module of none of SD 1.5, SD 2.1"),
        (["convert", "peft", "--to", "kohya"], "is in no component of SD 1.5, SD 2.1, SDXL"),
        (["convert", "peft", "--to", "mlx", "--full-rank", "2"], "for files of image generators"),
    ],
)
def test_what_cannot_be_done_is_said(words, message, world, tmp_path, run):
    ones = np.ones((320, 320), np.float32)
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    safetensors_file.write("whole.safetensors", {f"{key}.diff": ones})
    other = {f"lora_unet_mine.lora_{x}.weight": ones[:2, :2] for x in ("down", "up")}
    safetensors_file.write("other.safetensors", other)
    files.peft(tmp_path / "peft")
    done = run(*words, "--out", "made")
    assert done.status == 1 and message in done.err and done.err.count("\n") == 1


def test_a_language_model_refuses_such_a_file(world, run):
    done = run("generate", "--model", "tiny", "--adapter", "style.safetensors", "--prompt", "a")
    assert done.status == 1 and "a kohya adapter is for an image generator" in done.err
