"""Read a PEFT directory: `adapter_config.json` and `adapter_model.safetensors`."""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from lora_jax.adapters.split import base_of
from lora_jax.core.errors import AdapterFileError, ConfigError
from lora_jax.files.naming import Naming
from lora_jax.files.peft import changed_base
from lora_jax.files.peft.adapter_file import PeftFile, read_file
from lora_jax.files.peft.config import CONFIG
from lora_jax.files.peft.read import read_contents
from lora_jax.files.peft.wrong_names import tell_wrong_names
from lora_jax.files.stack_index import INDEX, read_or_list
from lora_jax.files.torch_adapters.contents import TorchBase
from lora_jax.files.torch_adapters.to_tree import FitOptions, fit_to_base


def load(
    directory: str | os.PathLike,
    base: Any,
    naming: Naming,
    *,
    strict: bool = True,
    dtype: Any = None,
    dropout: float | None = None,
    residual: bool = False,
    rename: Mapping[str, str] | None = None,
    fsdp: str | Sequence[str] | None = None,
    names: str | Sequence[str] | None = None,
) -> Any:
    """Load the adapters in PEFT's two files as an overlay of `base`, as in `join(base, load(...))`.

    Supported are the factors of linear layers, GPT-2's Conv1D, embeddings, convolutions and
    experts' parameters (`target_parameters`), DoRA's magnitudes, biases, modules in
    `modules_to_save`, and trained rows of embeddings
    (https://huggingface.co/docs/peft/developer_guides/checkpoint). The scale is α/r or α/√r, with
    each module's rank and alpha from the patterns. If one leaf of the tree stands for several
    PyTorch modules, their factors are joined. The layers of a stack are padded with zeros to the
    largest rank, and layers that are not in the file get the scale 0. A fused q, k, v gets the
    stacked A's and a block-diagonal B, so its rank is the sum.

    An adapter that was saved on the base that PiSSA or OLoRA left gets twice the rank: what they
    subtracted is recomputed from the original base, as PEFT does, and its dropout is off. Only
    safetensors files are read, never a pickle.

    The directory of a stack, which `save` wrote, is loaded as a stack of adapters, and with `names`
    so is any directory with a directory for each adapter, as PEFT writes several.

    Args:
      directory: with `adapter_config.json` and `adapter_model.safetensors`, or that of a stack.
      base: the parameters that the adapters are for, arrays or `ShapeDtypeStruct`s, or a joined
        tree, of which only the base is used. Values are needed only for `lora_bias`, and if the
        file fully trains a part of a leaf.
      naming: which PyTorch tensor is which leaf of `base`.
      strict: whether a tensor that does not fit is an error. Otherwise it is ignored, and one
        `UserWarning` lists all such tensors.
      dtype: of the factors and trained values; None for the file's.
      dropout: the rate of the factors' dropout, for `with_dropout`; None for the file's
        `lora_dropout`. One rate for all lets overlays of several files be stacked.
      residual: whether `base` is what an initialization such as PiSSA left of the original base, so
        that A and B stand as they are in the file.
      rename: parts of the tensors' names in the file, and what takes the place of their first
        occurrence, "" for nothing: {"base_model.model.bert": "base_model.model", "default": ""}.
        The part "" is the beginning of every name.
      fsdp: the names of the mesh axes that shard weights only to save memory. On a mesh factors
        are sharded as their weights are, but not along these; None stands for `data`, `fsdp`, `dp`,
        `ddp`, `batch` and `replica`, see `lora_jax.shardings`.
      names: the adapters of a stack to load, in this order; one name alone gives that adapter, not
        a stack.

    Raises:
      AdapterFileError: a file is missing or damaged, contains NaN or infinity, or its configuration
        cannot be used; with `strict` also if tensors are missing, unexpected or of another shape or
        dtype, or modules are not in the naming or the base. All problems are listed at once.
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
    path = Path(directory)
    one = functools.partial(
        _load_one,
        base=base,
        naming=naming,
        strict=strict,
        dtype=dtype,
        dropout=dropout,
        residual=residual,
        rename=rename,
        fsdp=fsdp,
    )
    if not path.is_dir() or (names is None and not (path / INDEX).is_file()):
        return one(path)
    index = read_or_list(path, names, lambda x: x if (path / x / CONFIG).is_file() else None)
    overlays = [one(path / name) for name in index.choose(str(path), names)]
    return overlays[0] if isinstance(names, str) else index.stack(path, overlays)


def _load_one(directory: Path, base: Any, naming: Naming, **options: Any) -> Any:
    """Return the adapters of one directory."""
    return fit(read_file(directory), base, naming, **options)


def fit(
    file: PeftFile,
    base: Any,
    naming: Naming,
    *,
    residual: bool = False,
    rename: Mapping[str, str] | None = None,
    **options: Unpack[FitOptions],
) -> Any:
    """Return the adapters of a file as an overlay of `base`; what `load` does after reading."""
    model = TorchBase(base_of(base), naming)
    try:
        file = file.rename(rename) if rename else file
        contents, problems = read_contents(file, model)
        problems = tell_wrong_names(file, model, problems)
        if file.config.changes_base and not residual:
            problems += changed_base.undo(contents, file.config, model)
    except ConfigError as error:  # or a pattern takes too long
        raise AdapterFileError(f"{file.directory / CONFIG}: {error}") from None
    return fit_to_base(file.source, contents, problems, model, **options)
