"""A recorded case of peft, edited."""

import json

import pytest

from lora_jax import peft
from lora_jax.files.disk import safetensors_file
from tests.parity.peft import models


@pytest.fixture
def edited(tmp_path):
    """Return a recorded case with changed tensors and configuration."""

    def edit(case, change=lambda tensors: None, **fields):
        folder = models.unpack(case, tmp_path / case)
        config = json.loads((folder / peft.CONFIG).read_text()) | fields
        (folder / peft.CONFIG).write_text(json.dumps(config))
        tensors, _ = safetensors_file.read(folder / peft.TENSORS)
        change(tensors)
        safetensors_file.write(folder / peft.TENSORS, tensors)
        return folder

    return edit
