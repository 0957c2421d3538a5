"""A LoRA file of an image generator, read without a base."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lora_jax.core.errors import AdapterFileError, ConfigError
from lora_jax.core.foreign import shown
from lora_jax.files.diffusion import fields
from lora_jax.files.diffusion.meaning import DORA, meaning, method_of
from lora_jax.files.diffusion.metadata import KEY, read_configs
from lora_jax.files.diffusion.weight import Weight
from lora_jax.files.disk import safetensors_file
from lora_jax.files.peft.config import PeftConfig
from lora_jax.files.torch_adapters.experts import Experts
from lora_jax.files.torch_adapters.factors import TorchFactors
from lora_jax.files.torch_adapters.file_contents import FileContents, missing_factor
from lora_jax.files.torch_adapters.rename import renamed

#: The fields that belong to a module's bias or to a norm, not to its weight.
ADDED = {"diff_b": "bias", "b_norm": "bias", "w_norm": "weight"}
#: The field of a norm's whole weight.
REPLACED = "scale"


@dataclasses.dataclass(frozen=True)
class DiffusionFile:
    """A LoRA file of an image generator, parsed.

    Attributes:
      source: the file.
      tensors: by name.
      metadata: the strings in its header.
      configs: PEFT's configuration of each component, where diffusers wrote it.
    """

    source: Path
    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]
    configs: dict[str, PeftConfig]

    def rename(self, parts: Mapping[str, str]) -> "DiffusionFile":
        """Return the file with other names of tensors, see `torch_adapters.rename`.

        Raises:
          ConfigError: a part is in no name, or two names become equal.
        """
        new = renamed(self.tensors, parts)
        return dataclasses.replace(self, tensors={new[name]: x for name, x in self.tensors.items()})

    def scale(self, component: str, module: str, rank: int) -> float | None:
        """Return the scale that PEFT's configuration gives a module, or None without one.

        Args:
          component: of the pipeline, "unet".
          module: its name within that.
          rank: of its factors.

        Raises:
          AdapterFileError: the configuration has another rank, or a pattern takes too long.
        """
        config = self.configs.get(component, self.configs.get(""))
        if config is None:
            return None
        try:
            wanted, scale = config.rank(module), config.scale(module)
        except ConfigError as error:
            raise AdapterFileError(f"{self.source}: {KEY}: {error}") from None
        if wanted != rank:
            raise AdapterFileError(
                f"{self.source}: {shown(module)} has rank {rank}, but {KEY} says {wanted}"
            )
        return scale

    def contents(self) -> FileContents:
        """Return what the file contains, without a base; modules have the file's names.

        Raises:
          AdapterFileError: as `scale`.
        """
        factors: dict[str, TorchFactors | Experts] = {}
        problems: dict[str, str] = {}
        others = {name: x.shape for name, x in self.tensors.items()}
        methods: dict[str, None] = {}
        has_dora = False
        for module, own in fields.group(self.tensors)[0].items():
            weight = {
                field: x for field, x in own.tensors.items() if field not in (*ADDED, REPLACED)
            }
            if not weight:
                continue
            with np.errstate(over="ignore", invalid="ignore"):
                found = missing_factor(weight, "down", "up") or meaning(weight, Weight())
            if isinstance(found, str):
                problems[module] = found
                continue
            methods[method_of(weight) or ""] = None
            has_dora |= any(field in weight for field in DORA)
            if not isinstance(found, TorchFactors):
                continue
            if "alpha" not in weight:
                component, _, local = module.partition(".")
                scale = self.scale(component, local, found.rank)
                found = found if scale is None else dataclasses.replace(found, scale=scale)
            factors[module] = found
            for field, name in own.names.items():
                if field not in (*ADDED, REPLACED, *DORA):
                    del others[name]
        return FileContents(
            variant=", ".join([*methods, *["DoRA"] * has_dora]) or "differences",
            base_model=self.metadata.get("ss_base_model_version"),
            use_rslora=False,
            factors=factors,
            others=others,
            weights={},
            problems=problems,
        )


def read_file(path: str | os.PathLike, *, finite: bool = True) -> DiffusionFile:
    """Read a LoRA file of an image generator.

    Args:
      path: a safetensors file of kohya's, LyCORIS' or diffusers' names.
      finite: reject NaN and infinite values.

    Raises:
      AdapterFileError: the file is missing or damaged, or its metadata cannot be used.
    """
    tensors, metadata = safetensors_file.read(path, finite=finite)
    if not tensors:
        raise AdapterFileError(f"{path}: contains no tensors")
    return DiffusionFile(Path(path), tensors, metadata, read_configs(str(path), metadata))
