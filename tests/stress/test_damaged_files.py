"""A few damaged files of each reader; `python -m tests.stress.damaged_files` reads any number."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import AdapterFileError, peft
from lora_jax.files.disk import safetensors_file
from tests.parity.peft.models import PLAIN
from tests.stress.damaged_files import adapters, check, gguf_bytes, known_fields, published
from tests.stress.damaged_files.readers import READERS, subject

FEWER = {
    "generate, merge": 4,
    "model directory": 10,
    "GGUF model": 10,
    "checkpoints": 12,
}  # what compiles or waits
#: Readers that take nearly everything: a value may be any JSON.
LENIENT = ("data", "run", "naming", "checkpoints", "generate, merge", "Orbax checkpoint")


@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_give_clear_errors_or_finite_values(reader, quick_compile):
    count = FEWER.get(reader, 20)
    tally = check.run(seed=7, numbers=range(count), among=[reader])
    assert tally.problems == []
    assert sum(tally.outcomes.values()) == count
    if reader not in LENIENT:
        assert count > tally.outcomes[reader, "clear error"] > count // 4


@pytest.mark.parametrize("reader", READERS)
def test_the_files_themselves_load(reader, tmp_path, quick_compile):
    name = READERS[reader][0][0]
    chosen = subject(reader, name)
    outcome, problem = check.judge(chosen, chosen.files, tmp_path / "whole")
    assert problem == "" and outcome.startswith(("loads", "succeeds", "restores"))


def test_gguf_files_are_taken_apart_and_put_together():
    whole = published.gguf("model").files["model.gguf"]
    assert gguf_bytes.encode(gguf_bytes.decode(whole)) == whole


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the process's memory")
def test_memory_of_one_reading_is_measured():
    """The figure that the command prints is not zero by construction."""
    _, large = check.growth(lambda: np.ones(40 * 2**20 // 8).sum())
    assert 35 * 2**20 < large < 100 * 2**20


@pytest.mark.parametrize(
    ("case", "value", "dtype", "match"),
    [("lora_bias", 3e38, None, "their dtype"), ("linear", 1e6, jnp.float16, "float16")],
)
def test_values_that_overflow_on_the_way(tmp_path, case, value, dtype, match):
    """Found by the command: the base's bias plus the added one overflows float32."""
    chosen = subject("PEFT", f"PEFT {case}")
    ending = "lora_B.bias" if case == "lora_bias" else "lora_B.weight"
    for name, data in chosen.files.items():
        (tmp_path / name).write_bytes(data)
    tensors, metadata = safetensors_file.read(tmp_path / peft.TENSORS)
    name = next(name for name in tensors if name.endswith(ending))
    tensors[name] = np.full_like(tensors[name], value)
    safetensors_file.write(tmp_path / peft.TENSORS, tensors, metadata)
    with pytest.raises(AdapterFileError, match=f"has values that overflow {match}"):
        peft.load(tmp_path, adapters.peft_base(), PLAIN, dtype=dtype)


def test_making_files_does_not_change_the_wrong_values():
    """They would be other files for the same number, after others or alone."""
    before = repr(known_fields.WRONG)
    for number in range(1000):
        check.mutation(3, number, ["run"])
    assert repr(known_fields.WRONG) == before
