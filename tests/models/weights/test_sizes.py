"""Into which files tensors go: as huggingface_hub splits them, recorded with 2.4.0."""

import numpy as np

from lora_jax.files.disk.safetensors_stream import InMemory
from lora_jax.models.weights.sizes import split_into_files

SIZES = (55, 25, 49, 57, 27, 3, 17, 33, 32, 26, 59, 51, 54, 20, 31, 23, 38, 58, 59, 14, 33, 9, 19)
#: What `split_torch_state_dict_into_shards(tensors, max_shard_size=50)` makes of these sizes.
FILES = (
    *((0,), (1,), (3,), (2,), (4, 5, 6), (7,), (8,), (10,), (11,), (12,), (9, 13), (14,), (15,)),
    *((17,), (18,), (16,), (19, 20), (21, 22)),
)


def test_files_are_those_of_huggingface_hub():
    tensors = {f"n{i}": InMemory(np.zeros(size, np.uint8)) for i, size in enumerate(SIZES)}
    assert split_into_files(tensors, 50) == [[f"n{i}" for i in file] for file in FILES]
