"""Write models for transformers, one tensor after the other."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.files import naming as names
from lora_jax.files.disk import processes
from lora_jax.files.disk.atomic import Content
from lora_jax.files.disk.safetensors_stream import InMemory, Tensor, to_bytes
from lora_jax.files.naming.writing_codes import float_leaves, to_torch_codes
from lora_jax.files.quantized import own
from lora_jax.models import hf_directory
from lora_jax.models.pretrained import Pretrained
from lora_jax.models.weights.sizes import MAX_SHARD_SIZE


def save(
    directory: str | Path, pretrained: Pretrained, *, max_shard_size: int | str = MAX_SHARD_SIZE
) -> None:
    """Write config.json and the weights, for `transformers` and for `load`.

    The weights are in model.safetensors, or, if they are larger than `max_shard_size`, in
    model-00001-of-00003.safetensors, ..., with model.safetensors.index.json. In host memory is only
    one tensor at a time beside the model itself. Where parameters span processes, all processes
    call this together, and process 0, which gathers all, writes.

    Args:
      directory: created if missing; other files in it, such as a tokenizer's, are kept.
      pretrained: a model whose `params` are plain arrays (merge adapters first). They are written
        in their dtype. Quantized weights are written as codes, which only `load` reads, with
        `quantize="keep"`, or as floats with a dtype.
      max_shard_size: of a file, in bytes or as "5GB", "500MB", "2GiB"; a larger tensor is alone in
        its file.

    Raises:
      StructureError: `params` has leaves that the model does not have, such as adapters; all are
        listed.
      ConfigError: `max_shard_size` is not a size.
      ModelFileError: the directory contains weights in other files, which would remain.
      OtherProcessError: in the other processes, if process 0 raises an error.
    """
    several = processes.span_processes(pretrained.params)
    if several:
        params = processes.to_first(pretrained.params)
        pretrained = dataclasses.replace(pretrained, params=params)
    processes.by_first(
        lambda: hf_directory.write(directory, *_file_contents(pretrained), max_shard_size),
        several=several,
    )


def files(
    pretrained: Pretrained, stored: Mapping[str, hf_directory.StoredTensor] | None = None
) -> dict[str, bytes]:
    """Return the files that `save` writes into one file, by name.

    Args:
      pretrained: as in `save`.
      stored: tensors of a base by name, whose dtypes are kept.

    Raises:
      StructureError: as in `save`.
    """
    contents = hf_directory.files(*_file_contents(pretrained, stored))
    return {
        name: to_bytes(content) if callable(content) else content
        for name, content in contents.items()
    }


def streamed_files(
    pretrained: Pretrained,
    stored: Mapping[str, hf_directory.StoredTensor] | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> dict[str, Content]:
    """Return the files that `save` writes, by name, to be written together with others.

    Weights are functions that write themselves to an open file, one tensor after the other.

    Args:
      pretrained, max_shard_size: as in `save`.
      stored: as in `files`.

    Raises:
      StructureError, ConfigError: as in `save`.
    """
    return hf_directory.files(*_file_contents(pretrained, stored), max_shard_size)


def _file_contents(
    pretrained: Pretrained, stored: Mapping[str, hf_directory.StoredTensor] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the content of config.json, and the tensors."""
    floats = float_leaves(pretrained.params)
    naming = pretrained.in_files or pretrained.naming
    tensors: dict[str, Tensor] = dict(names.to_torch_tensors(naming, floats))
    codes = to_torch_codes(naming, pretrained.params)
    for name, tensor in pretrained.rest.items():
        tensors[name] = tensor if hasattr(tensor, "blocks") else InMemory(tensor)
    for name, original in (stored or {}).items():
        if name in tensors and tensors[name].dtype != original.dtype:
            tensors[name] = _AsStored(tensors[name], original)
    settings = {"architectures": [pretrained.family.architecture], **pretrained.settings}
    # "torch_dtype" up to transformers 4.55; later versions read it too
    key = "torch_dtype" if "torch_dtype" in settings else "dtype"
    if not stored or key not in settings:
        settings[key] = _main_dtype({**tensors, **codes})
    if codes:
        settings[own.CONFIG] = own.config_of(codes)
    return settings, {**tensors, **own.parts_of(codes)}


@dataclass(frozen=True)
class _AsStored:
    """A tensor in the dtype of the base's, and the base's own where nothing changed."""

    tensor: Any
    stored: hf_directory.StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> np.dtype:
        return self.stored.dtype

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the whole tensor."""
        values, original = np.asarray(self.tensor), np.asarray(self.stored)
        if np.array_equal(original.astype(values.dtype), values):
            yield original
        else:
            yield values.astype(original.dtype)


def _main_dtype(tensors: Mapping[str, Any]) -> str:
    """Return the floating dtype that most numbers have, or stand for: norms in float32 are few."""
    count: dict[str, int] = {}
    for tensor in tensors.values():
        if jnp.issubdtype(tensor.dtype, jnp.floating):
            size = int(np.prod(tensor.shape, dtype=object))
            count[str(tensor.dtype)] = count.get(str(tensor.dtype), 0) + size
    return max(count, key=lambda dtype: count[dtype])
