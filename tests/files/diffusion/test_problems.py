"""LoRA files of image generators: what does not fit is told, before much is computed."""

import numpy as np
import pytest

from lora_jax import AdapterFileError, diffusion
from lora_jax.files.disk import safetensors_file
from lora_jax.files.naming import Entry, Naming
from tests.files.diffusion.models import ATTENTION, KEY, draw, glora, loha, lora, read


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_mid_block_x.lora_down.weight": draw(2, 6)}, "not in this base; nearest"),
        (lora("lora_te2_text_projection"), "lora_te2_text_projection: not in this base"),
        ({f"{KEY}.lora_down.weight": draw(2, 6)}, f"{KEY}: has down but not up"),
        ({f"{KEY}.alpha": np.array(1.0)}, "has only alpha, which makes no adapter"),
        (lora(ins=5), r"is for a weight of shape \(8, 5\), but the base's is \(8, 6\)"),
        (lora(alpha=np.array(0.0)), "alpha is 0, which trainers take for the rank"),
        (lora(alpha=draw(3)), "alpha is float32 of shape"),
        (lora(dora_scale=draw(5, 1)), r"dora_scale has shape \(5, 1\)"),
        (lora(dora_scale=draw(8, 2)), r"dora_scale has shape \(8, 2\)"),
        (lora(hada_w1_a=draw(2, 2)), "has hada_w1_a beside LoRA"),
        (lora(lora_mid=draw(2)), f"{KEY}.lora_mid: unexpected"),
        ({f"{KEY}.lora_down.weight": np.ones((2, 6), "int8")}, "has down but not up"),
        (lora() | {f"{KEY}.lora_up.weight": np.ones((8, 2), "int8")}, "up is int8, but only float"),
        (
            {f"{KEY}.weight": draw(8), f"{KEY}.on_input": np.array(0)},
            "IA³ is not of low rank here: pass full_rank=16",
        ),
        ({f"{KEY}.weight": draw(7), f"{KEY}.on_input": np.array(1)}, "has 7 gains of inputs"),
        ({f"{KEY}.weight": draw(8), f"{KEY}.on_input": np.array(2)}, r"\(8,\) and on_input 2"),
        ({f"{KEY}.weight": draw(8, 6)}, f"{KEY}.weight: unexpected"),
        ({f"{KEY}.oft_blocks": draw(2, 3, 3)}, r"oft_blocks turn 6 outputs, but .* \(8, 6\)"),
        ({f"{KEY}.oft_blocks": draw(2, 4, 3)}, r"shape \(2, 4, 3\), not \[blocks, n, n\]"),
        ({f"{KEY}.oft_blocks": draw(5, 4, 2, 2)}, "are not stages of a butterfly"),
        (
            {f"{KEY}.oft_blocks": draw(2, 4, 4), f"{KEY}.rescale": draw(1, 8)},
            r"rescale has shape \(1, 8\), not \[8",
        ),
        ({f"{KEY}.oft_diag": draw(2, 3, 3)}, "is of an early OFT, which is not read here"),
        (glora(ins=5), r"weight of shape \(8, 5\), but the base's is \(8, 6\)"),
        (glora() | {f"{KEY}.bm.weight": draw(1, 1)}, "has bm beside GLoRA"),
        (glora() | {f"{KEY}.a1.weight": draw(5, 1)}, r"a1 \(5, 1\), .* other numbers of inputs"),
        (glora() | {f"{KEY}.a2.weight": draw(2, 6)}, "are not two products"),
        ({f"{KEY}.diff_b": draw(8)}, r"to_q.diff_b: has no place: the base has no unet.mid_block"),
        ({f"{KEY}.w_norm": draw(8)}, "attn1.to_q.weight is not of a norm"),
        (lora() | lora(f"unet.{ATTENTION[5:].replace('/', '.')}.to_q"), "and so is lora_unet_mid"),
        (loha(), 'LoHa is not of low rank here: pass full_rank=16 .*or full_rank="train"'),
        ({f"{KEY}.diff": draw(8, 6)}, "a whole difference is not of low rank here"),
        (lora(dora_scale=draw(1, 6)), "DoRA by inputs is not of low rank here"),
        (loha() | {f"{KEY}.hada_t1": draw(2, 2, 3, 3)}, "are not a product"),
        ({f"{KEY}.lokr_w1": draw(2, 2)}, "lokr_w2 is neither whole nor in two factors"),
        (
            {f"{KEY}.lokr_w1": draw(3, 2), f"{KEY}.lokr_w2": draw(4, 3)},
            r"is for a weight of shape \(12, 6\)",
        ),
    ],
)
def test_what_does_not_fit_is_listed(tensors, message, tmp_path):
    with pytest.raises(AdapterFileError, match=message) as error:
        read(tmp_path, tensors | lora("lora_unet_conv_in", 6, 4))
    assert f"{tmp_path}" in str(error.value)
    assert "lora_unet_conv_in: is for a weight of shape (6, 4)" in str(error.value)  # and this too


@pytest.mark.parametrize("base", [True, False])
def test_small_files_that_ask_for_much_are_refused_first(base, tmp_path):
    """A core of a large kernel, and a Kronecker product: 10¹² numbers of 8 MB."""
    many = np.zeros((1, 10**6), "float32")
    core = {
        "lora_down.weight": many[..., None, None],
        "lora_mid.weight": many.reshape(1, 1, 1000, 1000),
    }
    core["lora_up.weight"] = np.zeros((6, 1, 1, 1), "float32")
    kron = {"lokr_w1": many.reshape(1000, 1000), "lokr_w2": many.reshape(1000, 1000)}
    key = "lora_unet_conv_in"
    for fields, of_base, alone in (
        (core, "lora_mid has the kernel", "give 1,000,000,000,000 numbers"),
        (kron, r"is for a weight of shape \(1000000, 1000000\)", None),
    ):
        tensors = {f"{key}.{name}": x for name, x in fields.items()}
        if base:
            with pytest.raises(AdapterFileError, match=of_base):
                read(tmp_path, tensors)
            continue
        safetensors_file.write(tmp_path / "lora.safetensors", tensors)
        contents = diffusion.read_file(tmp_path / "lora.safetensors").contents()
        assert contents.problems.keys() == ({key} if alone else set())
        assert alone is None or alone in contents.problems[key]
        assert not contents.factors


def test_a_naming_without_components_is_told_what_to_do(tmp_path):
    rows = Naming((Entry("{*m}.weight", "{*m}/kernel", "linear"),))
    with pytest.raises(AdapterFileError, match=r"begin with unet\., .*; see Naming.with_prefix"):
        read(tmp_path, lora(), tree={"conv_in/kernel": draw(6, 8)}, naming=rows)
