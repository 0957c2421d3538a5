"""Which kind of file or directory a path on the command line is, by what is in it."""

import dataclasses
from pathlib import Path
from typing import Any

from lora_jax.core.errors import AdapterFileError
from lora_jax.files.disk.safetensors_file import headers, read_directory
from lora_jax.files.disk.strict_json import parse_json

PEFT, MLX, NATIVE = "peft", "mlx", "native"  # kinds of adapters
CHECKPOINT, GGUF, TINY = "checkpoint", "gguf", "tiny"  # kinds of models
CONFIG = "adapter_config.json"
PEFT_WEIGHTS, MLX_WEIGHTS = "adapter_model.safetensors", "adapters.safetensors"
DESCRIPTIONS = {
    PEFT: "PEFT adapter",
    MLX: "mlx-lm adapter",
    NATIVE: "lora_jax adapter",
    CHECKPOINT: "model checkpoint",
    GGUF: "GGUF model",
    TINY: "model of random weights",
}


@dataclasses.dataclass(frozen=True)
class Found:
    """What a path is: a kind above, and the directory or file that it lies in."""

    kind: str
    path: Path


def adapter(path: Path) -> Found:
    """The adapter at `path`: a directory of PEFT or mlx-lm, or a native file.

    The weights file in such a directory stands for the directory.

    Raises:
      AdapterFileError: there is none; the message says what there is instead.
    """
    found = detect(path)
    if found.kind in (CHECKPOINT, GGUF):
        raise AdapterFileError(
            f"{path}: a {DESCRIPTIONS[found.kind]}, not an adapter: give the adapter's directory "
            "or file here"
        )
    return found


def detect(path: Path) -> Found:
    """What is at `path`, adapter or model.

    Raises:
      AdapterFileError: nothing is there, or nothing that is known.
    """
    if path.is_dir():
        return Found(_directory(path), path)
    if not path.exists():
        raise AdapterFileError(f"{path}: there is no such file or directory")
    if not path.is_file():
        raise AdapterFileError(f"{path}: neither a file nor a directory")
    with path.open("rb") as file:
        if file.read(4) == b"GGUF":
            return Found(GGUF, path)
    header = headers(path)
    if header.metadata.get("format") == "lora_jax":
        return Found(NATIVE, path)
    if (path.parent / CONFIG).is_file() and path.name in (PEFT_WEIGHTS, MLX_WEIGHTS):
        return Found(_directory(path.parent), path.parent)
    if any(".lora_" in name for name in header.tensors):
        raise AdapterFileError(
            f"{path}: tensors of an adapter without its {CONFIG}, which holds rank and scale: "
            "give the directory that has both"
        )
    raise AdapterFileError(
        f"{path}: a safetensors file without adapters (its first tensor is "
        f"{next(iter(header.tensors), None)!r}); of a model give the directory"
    )


def _directory(path: Path) -> str:
    files = read_directory(path, [CONFIG])
    if CONFIG in files:
        config = parse_json(files[CONFIG], str(path / CONFIG))
        if not isinstance(config, dict):
            raise AdapterFileError(f"{path / CONFIG}: holds no JSON object")
        if "peft_type" in config:
            return PEFT
        if {"lora_parameters", "fine_tune_type"} & config.keys() or (path / MLX_WEIGHTS).is_file():
            return MLX
        raise AdapterFileError(
            f"{path / CONFIG}: neither PEFT's, which has peft_type, nor mlx-lm's, which has "
            f"lora_parameters; it has {', '.join(sorted(map(str, config))) or 'nothing'}"
        )
    if (path / "config.json").is_file():
        return CHECKPOINT
    names = sorted(entry.name for entry in path.iterdir())
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    raise AdapterFileError(
        f"{path}: neither an adapter ({CONFIG}) nor a model (config.json); "
        + (f"it holds {shown}" if names else "it is empty")
    )


def read_json(path: Path) -> Any:
    """The JSON value in a file, strictly read; an error names the file."""
    return parse_json(path.read_bytes(), str(path))
