"""A few damaged files; `python -m tests.stress.damaged_files` damages any number."""

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import AdapterFileError, peft
from lora_jax.files.disk import safetensors_file
from tests.parity.peft.models import PLAIN
from tests.stress.damaged_files import check
from tests.stress.damaged_files.subjects import FORMATS, subject


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_files_give_clear_errors_or_finite_values(format, quick_compile):
    tally = check.run(seed=7, numbers=range(60), formats=[format])
    assert tally.problems == []
    assert tally.outcomes[format, "clear error"] > 30
    assert sum(tally.outcomes.values()) == 60 > tally.outcomes[format, "clear error"]


@pytest.mark.parametrize(
    ("case", "value", "dtype", "match"),
    [("lora_bias", 3e38, None, "their dtype"), ("linear", 1e6, jnp.float16, "float16")],
)
def test_values_that_overflow_on_the_way(tmp_path, case, value, dtype, match):
    """Found by the command: the base's bias plus the added one overflows float32."""
    chosen = subject(f"PEFT {case}")
    ending = "lora_B.bias" if case == "lora_bias" else "lora_B.weight"
    for name, data in chosen.files.items():
        (tmp_path / name).write_bytes(data)
    tensors, metadata = safetensors_file.read(tmp_path / peft.TENSORS)
    name = next(name for name in tensors if name.endswith(ending))
    tensors[name] = np.full_like(tensors[name], value)
    safetensors_file.write(tmp_path / peft.TENSORS, tensors, metadata)
    with pytest.raises(AdapterFileError, match=f"has values that overflow {match}"):
        peft.load(tmp_path, chosen.base, PLAIN, dtype=dtype)
