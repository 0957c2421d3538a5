"""The scripts that record and check need what they record; the suite does not."""

import json

import pytest

from lora_jax import peft, tensorfile
from tests.peft import models

collect_ignore_glob = ["record*.py", "check*.py"]


@pytest.fixture
def edited(tmp_path):
    """A recorded case, its tensors and configuration changed."""

    def edit(case, change=lambda tensors: None, **fields):
        folder = models.unpack(case, tmp_path / case)
        config = json.loads((folder / peft.CONFIG).read_text()) | fields
        (folder / peft.CONFIG).write_text(json.dumps(config))
        tensors, _ = tensorfile.read(folder / peft.TENSORS)
        change(tensors)
        tensorfile.write(folder / peft.TENSORS, tensors)
        return folder

    return edit
