"""Which kind of adapter or model a path is, decided by its content."""

import dataclasses
from pathlib import Path

from lora_jax.core.errors import AdapterFileError
from lora_jax.files import diffusion, mlx, native, peft, several
from lora_jax.files.disk import gguf_file
from lora_jax.files.disk.atomic import read_directory
from lora_jax.files.disk.safetensors_file import headers
from lora_jax.files.disk.strict_json import parse_json

# kinds of adapters
PEFT, MLX, NATIVE, GGUF_ADAPTER = "peft", "mlx", "native", "gguf_adapter"
KOHYA, DIFFUSERS, PIPELINE = "kohya", "diffusers", "pipeline"
OF_IMAGES = (KOHYA, DIFFUSERS, PIPELINE)  # those of image generators
CHECKPOINT, GGUF, TINY = "checkpoint", "gguf", "tiny"  # kinds of models
DESCRIPTIONS = {
    PEFT: "PEFT adapter",
    MLX: "mlx-lm adapter",
    NATIVE: "lora_jax adapter",
    GGUF_ADAPTER: "GGUF adapter",
    KOHYA: "kohya adapter",
    DIFFUSERS: "diffusers adapter",
    PIPELINE: "pipeline of PEFT adapters",
    CHECKPOINT: "model checkpoint",
    GGUF: "GGUF model",
    TINY: "model of random weights",
}
_CONFIG = peft.CONFIG  # mlx-lm's file has the same name
_MODEL_CONFIG = "config.json"
_ORBAX = "_METADATA"
_FACTOR = ".lora_"  # in the names of all PyTorch formats


@dataclasses.dataclass(frozen=True)
class Found:
    """What a path is: one of the kinds above, and the directory or file that holds it."""

    kind: str
    path: Path


def adapter(path: Path) -> Found:
    """Find the adapter at `path`: a directory of PEFT or mlx-lm, a native file, a
    GGUF file, or a LoRA file of an image generator.

    The weights file in such a directory stands for the directory, and the directory of a training
    run for its last adapter, or for the best one if it has no other.

    Raises:
      AdapterFileError: there is none; the message says what there is instead.
    """
    found = detect(next(iter(of_run(path).values()), path))
    if found.kind in (CHECKPOINT, GGUF):
        raise AdapterFileError(
            f"{path}: a {DESCRIPTIONS[found.kind]}, not an adapter; give the adapter's directory "
            "or file here"
        )
    return found


def of_run(path: Path) -> dict[str, Path]:
    """Return the adapters in the directory of a training run: the last and the best one."""
    if any((path / name).is_file() for name in (_CONFIG, _MODEL_CONFIG)):
        return {}  # an adapter or a model itself
    places = {name: [path / name, path / f"{name}.safetensors"] for name in ("adapter", "best")}
    there = {name: next((x for x in xs if x.exists()), None) for name, xs in places.items()}
    return {name: place for name, place in there.items() if place is not None}


def detect(path: Path) -> Found:
    """Find the adapter or model at `path`.

    Raises:
      AdapterFileError: nothing is there, or nothing of a known kind.
    """
    if path.is_dir():
        return Found(_kind_of_directory(path), path)
    if native.member_of(path)[1] is not None:
        native.read_metadata(path)
        return Found(NATIVE, path)
    if not path.exists():
        raise AdapterFileError(f"{path}: no such file or directory")
    if not path.is_file():
        raise AdapterFileError(f"{path}: neither a file nor a directory")
    with path.open("rb") as file:
        if file.read(4) == b"GGUF":
            return Found(GGUF_ADAPTER if gguf_file.general_type(path) == "adapter" else GGUF, path)
    try:
        header = headers(path)
    except AdapterFileError:
        if path.suffix == native.SUFFIX:
            raise
        raise AdapterFileError(
            f"{path}: neither a safetensors nor a GGUF file, so neither an adapter nor a model"
        ) from None
    if native.is_header(header.metadata):
        return Found(NATIVE, path)
    if (path.parent / _CONFIG).is_file() and path.name in (peft.TENSORS, mlx.TENSORS):
        return Found(_kind_of_directory(path.parent), path.parent)
    layout = diffusion.layout_of(header.tensors)
    if layout is not None:
        return Found(layout, path)
    if any(_FACTOR in name for name in header.tensors):
        raise AdapterFileError(
            f"{path}: an adapter's tensors without its {_CONFIG}, which holds rank and scale; "
            "give the directory that contains both"
        )
    raise AdapterFileError(
        f"{path}: a safetensors file without adapters (its first tensor is "
        f"{next(iter(header.tensors), None)!r}); if it belongs to a model, give its directory"
    )


def components_in(path: Path) -> list[str]:
    """Return the components of a pipeline that have a PEFT adapter in a directory: "unet", ..."""
    return [name for name in diffusion.COMPONENTS if (path / name / _CONFIG).is_file()]


def _kind_of_directory(path: Path) -> str:
    files = read_directory(path, [_CONFIG])
    if _CONFIG in files:
        config = parse_json(files[_CONFIG], str(path / _CONFIG))
        if not isinstance(config, dict):
            raise AdapterFileError(f"{path / _CONFIG}: must contain a JSON object")
        if peft.is_config(config):
            return PEFT
        if mlx.is_config(config) or (path / mlx.TENSORS).is_file():
            return MLX
        raise AdapterFileError(
            f"{path / _CONFIG}: neither PEFT's, which has peft_type, nor mlx-lm's, which has "
            f"lora_parameters; it has {', '.join(sorted(map(str, config))) or 'nothing'}"
        )
    if (path / _MODEL_CONFIG).is_file():
        return CHECKPOINT
    if (path / _ORBAX).is_file():
        raise AdapterFileError(
            f"{path}: an Orbax checkpoint; read it with lora_jax.orbax.load, or convert it with "
            "lora-jax convert --trainer"
        )
    if components_in(path):
        return PIPELINE
    for one in several.adapters_at(path).values():
        raise AdapterFileError(
            f"{path}: several adapters, and one is needed; give one of them: {one}"
        )
    names = sorted(entry.name for entry in path.iterdir())
    within = [name for name in names if (path / name / _CONFIG).is_file()]
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    raise AdapterFileError(
        f"{path}: neither an adapter ({_CONFIG}) nor a model ({_MODEL_CONFIG}); "
        + (f"it contains {shown}" if names else "it is empty")
        + (f"; {within[-1]} is an adapter" if within else "")
    )
