"""Read a LoRA file of an image generator onto a base."""

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, Unpack

from lora_jax.adapters.split import base_of
from lora_jax.core.checks import is_integer
from lora_jax.core.errors import AdapterFileError, ConfigError
from lora_jax.core.foreign import shown_value
from lora_jax.files.diffusion.adapter_file import DiffusionFile, read_file
from lora_jax.files.diffusion.components import COMPONENTS, WITHOUT
from lora_jax.files.diffusion.index import Index
from lora_jax.files.diffusion.read import Reading
from lora_jax.files.naming import Naming
from lora_jax.files.torch_adapters.contents import TorchBase, module_of
from lora_jax.files.torch_adapters.to_tree import FitOptions, fit_to_base

#: What becomes of changes that are not of low rank.
FullRank = int | Literal["train"] | None


def load(
    path: str | os.PathLike,
    base: Any,
    naming: Naming,
    *,
    full_rank: FullRank = None,
    components: Collection[str] | None = None,
    strict: bool = True,
    dtype: Any = None,
    dropout: float | None = None,
    rename: Mapping[str, str] | None = None,
    fsdp: str | Sequence[str] | None = None,
) -> Any:
    """Load the adapters in a LoRA file of an image generator as an overlay of `base`.

    Read are kohya's files ("lora_unet_", "lora_te_", "lora_transformer_" and so on: linear layers,
    convolutions, LoCon with its Tucker cores, `alpha`, `dora_scale`), LyCORIS' (LoHa, LoKr, GLoRA,
    OFT, BOFT, IA³, whole differences, norms and biases), and those of diffusers and PEFT
    ("unet.x.lora_A.weight"), older ones too. Names with underscores are looked up among the modules
    of the base, and in the names of the original codes of Stable Diffusion ("input_blocks_4_1"),
    Flux ("double_blocks_0", whose factors of a fused q, k, v are cut into those of three modules)
    and newer models.

    All changes are exact: a product that LoHa, LoKr or GLoRA makes becomes the factors of its rank,
    where these are smaller than the weight. What is not of low rank in this sense, and DoRA by
    inputs (LyCORIS' `wd_on_out=False`), becomes what `full_rank` says.

    Args:
      path: a safetensors file.
      base: the parameters that the adapters are for, arrays or `ShapeDtypeStruct`s, or a joined
        tree, of which only the base is used: {"unet": params}. Values are needed for biases, norms,
        DoRA by inputs, GLoRA, OFT, BOFT, IA³, and `full_rank="train"`.
      naming: which PyTorch tensor is which leaf of `base`, with the component before the names:
        "unet.conv_in.weight". See `lora_jax.diffusion.naming`.
      full_rank: what becomes of changes that are not of low rank: a rank, for the closest factors
        of that rank, or "train", for fully trained weights. None makes them an error.
      components: those to read, such as ["unet"]; None for all, so that a file with a component
        that is not in the base is an error.
      strict, dtype, dropout, rename, fsdp: as for `lora_jax.peft.load`; files contain no dropout.

    Raises:
      ConfigError: `full_rank` or `components` is not one of the above.
      AdapterFileError: the file is missing or damaged, or its tensors do not fit the base; all
        problems are listed at once.

    >>> import tempfile, jax, jax.numpy as jnp, lora_jax
    >>> base = {"unet": {"conv_in": {"kernel": jnp.ones((3, 3, 4, 8))}}}
    >>> params = lora_jax.init(jax.random.key(0), base, lora_jax.LoraConfig(
    ...     rank=2, alpha=4, overrides={".*": lora_jax.Override(layout="iiio")}))
    >>> rows = lora_jax.diffusion.naming("sd15")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lora_jax.diffusion.save(f"{folder}/lora.safetensors", params, rows)
    ...     adapters = load(f"{folder}/lora.safetensors", base, rows)
    >>> adapters["unet"]["conv_in"]["kernel"].a.shape
    (3, 3, 4, 2)
    """
    options: dict[str, Any] = {"strict": strict, "dtype": dtype, "dropout": dropout, "fsdp": fsdp}
    file = read_file(path)
    file = file.rename(rename) if rename else file
    return fit(file, base, naming, full_rank=full_rank, components=components, **options)


def fit(
    file: DiffusionFile,
    base: Any,
    naming: Naming,
    *,
    full_rank: FullRank = None,
    components: Collection[str] | None = None,
    **options: Unpack[FitOptions],
) -> Any:
    """Return the adapters of a file as an overlay of `base`; what `load` does after reading."""
    _check_options(full_rank, components)
    model = TorchBase(base_of(base), naming)
    reading = read_contents(file, model, full_rank, components)
    return fit_to_base(file.source, reading.found, reading.problems, model, **options)


def read_contents(
    file: DiffusionFile, model: TorchBase, full_rank: FullRank, components: Collection[str] | None
) -> Reading:
    """Return what of a file fits the base, and what is wrong with the rest.

    Raises:
      AdapterFileError: no name of the base begins with a component.
    """
    index = Index(module_of(name) for name in model.index if name.endswith(".weight"))
    if not index.components:
        raise AdapterFileError(f"{file.source} cannot be read onto this base: {WITHOUT}")
    reading = Reading(file, model, index, full_rank, components)
    reading.read()
    return reading


def _check_options(full_rank: Any, components: Any) -> None:
    is_rank = is_integer(full_rank) and full_rank > 0
    if not (is_rank or full_rank is None or full_rank == "train"):
        raise ConfigError(f'full_rank must be a rank or "train", got {shown_value(full_rank)}')
    is_list = isinstance(components, Collection) and not isinstance(components, str)
    if components is not None and not (is_list and {*components} <= COMPONENTS.keys()):
        known = ", ".join(COMPONENTS)
        raise ConfigError(f"components must be a list of {known}, got {shown_value(components)}")
