"""Read a PEFT directory: `adapter_config.json` and `adapter_model.safetensors`."""

import os
from pathlib import Path
from typing import Any

from lora_jax.adapters.split import base_of
from lora_jax.core.errors import AdapterFileError, ConfigError
from lora_jax.files.disk import safetensors_file
from lora_jax.files.naming import Naming
from lora_jax.files.peft import read
from lora_jax.files.peft.config import PeftConfig, parse_config
from lora_jax.files.torch_adapters.contents import Model
from lora_jax.files.torch_adapters.to_tree import fitted

#: The two files of an adapter directory.
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def load(
    directory: str | os.PathLike,
    base: Any,
    naming: Naming,
    *,
    strict: bool = True,
    dtype: Any = None,
) -> Any:
    """The adapters in PEFT's two files, as an overlay of `base`: `join(base, load(...))` runs.

    Read are the factors of linear layers, GPT-2's Conv1D, embeddings, convolutions and experts'
    parameters (`target_parameters`), DoRA's magnitudes, biases, modules saved whole and trained
    rows of embeddings
    (https://huggingface.co/docs/peft/developer_guides/checkpoint). The scale is α/r or α/√r of each
    module, its rank and alpha those of the patterns. Where the tree has one leaf for several of
    torch's modules, the factors are joined: layers of a stack are padded with zeros to the largest
    rank, and layers that the file does not have get the scale 0; a fused q, k, v gets A's one
    behind another and a block-diagonal B, so its rank is the sum.

    Only safetensors are read, never a pickle.

    Args:
      directory: with `adapter_config.json` and `adapter_model.safetensors`.
      base: the parameters that the adapters are for, arrays or `ShapeDtypeStruct`s (a joined tree's
        own base counts). Values are needed only for `lora_bias`, and where a file trains a part of
        a leaf whole.
      naming: which torch tensor is which leaf of `base`.
      strict: whether a tensor that does not fit is an error; otherwise it is left out, and one
        `UserWarning` lists what was.
      dtype: of the factors and trained values; None for the file's.

    Raises:
      AdapterFileError: a file is missing, damaged, holds NaN or infinity, or a configuration that
        cannot be; with `strict` also where tensors are missing, unexpected, of another shape or
        dtype, or modules are unknown to the naming or the base: all are listed at once.
      StructureError: the naming does not fit the base.

    >>> import tempfile, jax, jax.numpy as jnp, lora_jax
    >>> from lora_jax.files.naming import Entry
    >>> base = {"up": {"kernel": jnp.ones((4, 3))}}
    >>> params = lora_jax.init(jax.random.key(0), base, lora_jax.LoraConfig(rank=2, alpha=4))
    >>> naming = Naming((Entry("{*m}.weight", "{*m}/kernel", "linear"),))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lora_jax.peft.save(f"{folder}/adapter", params, naming)
    ...     adapters = load(f"{folder}/adapter", base, naming)
    >>> adapters["up"]["kernel"].a.shape, float(adapters["up"]["kernel"].scale)
    ((4, 2), 2.0)
    """
    base = base_of(base)
    config, data = _read_files(directory)
    source = Path(directory) / TENSORS
    tensors, _ = safetensors_file.decode(data, str(source), finite=True)
    model = Model(base, naming)
    try:
        contents, problems = read.contents(tensors, config, model)
    except ConfigError as error:  # a pattern that takes too long
        raise AdapterFileError(f"{Path(directory) / CONFIG}: {error}") from None
    return fitted(source, contents, problems, model, strict=strict, dtype=dtype)


def read_config(directory: str | os.PathLike) -> PeftConfig:
    """The `adapter_config.json` in a directory.

    Raises:
      AdapterFileError: there is none, or it cannot be read as one; keys and values are named.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / CONFIG).write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    ...     read_config(folder).scale("h.0.up")
    2.0
    """
    path = Path(directory) / CONFIG
    return _parse(path, _files(directory, [CONFIG])[CONFIG])


def _read_files(directory: str | os.PathLike) -> tuple[PeftConfig, bytes]:
    files = _files(directory, [CONFIG, TENSORS])
    path = Path(directory) / CONFIG
    return _parse(path, files[CONFIG]), files[TENSORS]


def _files(directory: str | os.PathLike, names: list[str]) -> dict[str, bytes]:
    try:
        files = safetensors_file.read_directory(directory, names)
    except OSError as error:
        raise AdapterFileError(f"{directory}: cannot be read: {error.strerror}") from None
    for name in names:
        if name not in files:
            pickled = Path(directory) / "adapter_model.bin"
            why = f"; {pickled.name} is a pickle, and not read" if pickled.exists() else ""
            raise AdapterFileError(f"{Path(directory) / name}: there is no such file{why}")
    return files


def _parse(path: Path, text: bytes) -> PeftConfig:
    try:
        return parse_config(text)
    except ConfigError as error:
        raise AdapterFileError(f"{path}: {error}") from None
