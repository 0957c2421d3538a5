"""The factors in an adapter file of any kind, without the base: what `inspect` looks at."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.core.checks import is_number
from lora_jax.core.errors import AdapterFileError
from lora_jax.files import kinds
from lora_jax.files.disk.safetensors_file import decode, read, read_directory
from lora_jax.files.native import read_metadata
from lora_jax.files.peft import PeftConfig, tensor_names
from lora_jax.files.peft.load import read_config


@dataclasses.dataclass(frozen=True)
class Factors:
    """The update `scale · A · B` of one matrix: a layer of a stack, and an expert, has its own."""

    module: str
    a: np.ndarray  # [in, rank]
    b: np.ndarray  # [rank, out]
    scale: float
    alpha: float


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """What an adapter file holds."""

    kind: str
    path: Path
    base: str | None  # the name of the model that it was made for
    variant: str  # "LoRA", "rsLoRA", "DoRA", ...
    factors: list[Factors]
    whole: dict[str, tuple[int, ...]]  # other trained tensors: biases, heads, rows, magnitudes
    dtypes: list[str]
    parameters: int

    @property
    def targets(self) -> list[str]:
        """The last names of the modules that have factors: "q_proj", "v_proj"."""
        names = (re.sub(r"(\[\d+\])+$", "", one.module) for one in self.factors)
        names = (re.sub(r"[/.](kernel|embedding)$", "", name) for name in names)
        return sorted({re.split(r"[/.]", name)[-1] for name in names})


def read_factors(path: Path) -> AdapterFile:
    """Read an adapter of any kind, see `kinds.adapter`.

    Raises:
      AdapterFileError: it cannot be read as what it is; all problems are listed.
    """
    found = kinds.adapter(path)
    readers = {kinds.PEFT: _peft, kinds.MLX: _mlx, kinds.NATIVE: _native}
    return readers[found.kind](found.path)


# --- Hugging Face PEFT ----------------------------------------------------------------------------

_SIDES = {
    **{"lora_A.weight": "A", "lora_embedding_A": "A"},
    **{"lora_B.weight": "B", "lora_embedding_B": "B"},
}


def saved_whole(names: Iterable[str], config: PeftConfig) -> set[str]:
    """The tensors of modules that are saved whole, which may themselves be called "lora_A"."""
    found = set()
    for name in names:
        inner = name.removeprefix(tensor_names.PREFIX)
        module = "." + inner.rpartition(".")[0]
        if any(module.endswith("." + saved) for saved in config.modules_to_save or ()):
            found.add(inner)
    return found


def _peft(path: Path) -> AdapterFile:
    config = read_config(path)
    tensors = _weights(path, kinds.PEFT_WEIGHTS)
    known = saved_whole(tensors, config)
    pairs: dict[str, dict[str, np.ndarray]] = {}
    whole = {}
    for name, tensor in tensors.items():
        part = tensor_names.part_of_name(name, tensors, known)
        if part is None:
            whole[name] = tensor.shape
        elif part.field in _SIDES:
            pairs.setdefault(part.module, {})[_SIDES[part.field]] = tensor
        else:
            whole[f"{part.module}.{part.field}" if part.field else part.module] = tensor.shape
    problems = _unpaired(pairs, "AB")
    factors = []
    for module, pair in pairs.items():
        if module not in problems:
            a, b = pair["A"].reshape(len(pair["A"]), -1).T, pair["B"].reshape(len(pair["B"]), -1)
            factors += _experts(config, module, a, b.T, problems)
    _raise(path, problems)
    variant = "rsLoRA" if config.use_rslora else "LoRA"
    return AdapterFile(
        kinds.PEFT,
        path,
        config.base_model_name_or_path,
        f"{variant}, DoRA" if config.use_dora else variant,
        _in_order(factors),
        whole,
        _dtypes(tensors.values()),
        sum(tensor.size for tensor in tensors.values()),
    )


def _experts(
    config: PeftConfig, module: str, a: np.ndarray, b: np.ndarray, problems: dict[str, str]
) -> list[Factors]:
    """A `[in, E·rank]` and B `[E·rank, out]`: PEFT keeps experts one way in A, another in B."""
    if a.shape[1] != b.shape[0]:
        problems[module] = f"A has rank {a.shape[1]}, B has {b.shape[0]}"
        return []
    total, rank = a.shape[1], config.rank(module)
    count = total // rank if config.target_parameters and total % rank == 0 else 1
    if count == 1:
        rank = total
    scale = config.scale(module, rank)
    return [
        Factors(
            module if count == 1 else f"{module}[{e}]",
            a[:, e * rank : (e + 1) * rank],
            b[e::count],
            scale,
            _alpha(scale, rank, config.use_rslora),
        )
        for e in range(count)
    ]


# --- mlx-lm ---------------------------------------------------------------------------------------

_MLX_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[ab])")


def _mlx(path: Path) -> AdapterFile:
    config = kinds.read_json(path / kinds.CONFIG)
    parameters = config.get("lora_parameters") if isinstance(config, dict) else None
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if not is_number(scale):
        raise AdapterFileError(
            f"{path / kinds.CONFIG}: lora_parameters must hold a number named scale, got {scale!r}"
        )
    tensors = _weights(path, kinds.MLX_WEIGHTS)
    pairs: dict[str, dict[str, np.ndarray]] = {}
    whole = {}
    for name, tensor in tensors.items():
        match = _MLX_FACTOR.fullmatch(name)
        if match is None:
            whole[name] = tensor.shape
        else:
            pairs.setdefault(match["module"], {})[match["side"]] = tensor
    problems = _unpaired(pairs, "ab")
    factors = []
    for module, pair in pairs.items():
        if module not in problems:
            factors += _mlx_factors(module, pair["a"], pair["b"], float(scale), problems)
    _raise(path, problems)
    base = config.get("model")
    return AdapterFile(
        kinds.MLX,
        path,
        base if isinstance(base, str) else None,
        "DoRA" if config.get("fine_tune_type") == "dora" else "LoRA",
        _in_order(factors),
        whole,
        _dtypes(tensors.values()),
        sum(tensor.size for tensor in tensors.values()),
    )


def _mlx_factors(
    module: str, a: np.ndarray, b: np.ndarray, scale: float, problems: dict[str, str]
) -> list[Factors]:
    """A `[in, rank]` and B `[rank, out]`; of experts `[E, rank, in]` and `[E, out, rank]`."""
    if a.ndim == b.ndim == 3 and len(a) == len(b) and a.shape[1] == b.shape[2]:
        pairs = zip(a, b, strict=True)
        return [
            Factors(f"{module}[{e}]", x.T, y.T, scale, scale * len(x))
            for e, (x, y) in enumerate(pairs)
        ]
    if a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0]:
        return [Factors(module, a, b, scale, scale * len(b))]
    problems[module] = f"shapes {a.shape} and {b.shape} are no A [in, rank] and B [rank, out]"
    return []


# --- lora_jax -------------------------------------------------------------------------------------


def _native(path: Path) -> AdapterFile:
    header, (tensors, _) = read_metadata(path), read(path)
    config, metadata = (
        header[name] if isinstance(header[name], dict) else {} for name in ("config", "metadata")
    )
    rslora = config.get("scaling") == "rslora"
    factors: list[Factors] = []
    problems: dict[str, str] = {}
    whole = {}
    for module, record in header["layouts"].items():
        try:
            if record["kind"] not in ("lora", "dora"):
                whole[module] = tensors[f"{module}.value"].shape
                continue
            fields = [tensors[f"{module}.{field}"] for field in ("a", "b", "scale")]
            factors += _layers(module, *fields, rslora=rslora)
            if record["kind"] == "dora":
                whole[f"{module}.magnitude"] = tensors[f"{module}.magnitude"].shape
        except (KeyError, TypeError, ValueError) as error:
            problems[module] = f"damaged ({error})"
    _raise(path, problems)
    dora = any(name.endswith(".magnitude") for name in whole)
    variant = "rsLoRA" if rslora else "LoRA"
    trained = {name: x for name, x in tensors.items() if not name.endswith(".scale")}
    return AdapterFile(
        kinds.NATIVE,
        path,
        _text(metadata.get("model")),
        f"{variant}, DoRA" if dora else variant,
        _in_order(factors),
        whole,
        _dtypes(trained.values()),
        sum(tensor.size for tensor in trained.values()),
    )


def _layers(
    module: str, a: np.ndarray, b: np.ndarray, scale: np.ndarray, *, rslora: bool
) -> Iterable[Factors]:
    """One matrix for each index of the batch axes, which are those of `scale`."""
    batch, rank = scale.shape, a.shape[-1]
    if a.shape[: len(batch)] != batch or b.shape[: len(batch) + 1] != (*batch, rank):
        raise ValueError(f"a {a.shape}, b {b.shape}, scale {scale.shape}")
    for index in np.ndindex(*batch):
        name = module + "".join(f"[{i}]" for i in index)
        own = float(scale[index])
        factors = a[index].reshape(-1, rank), b[index].reshape(rank, -1)
        yield Factors(name, *factors, own, _alpha(own, rank, rslora))


# --- what they share ------------------------------------------------------------------------------


def _weights(directory: Path, name: str) -> dict[str, np.ndarray]:
    files = read_directory(directory, [name])  # also where a save was killed between two files
    if name not in files:
        raise AdapterFileError(f"{directory / name}: there is no such file")
    return decode(files[name], str(directory / name))[0]


def _alpha(scale: float, rank: int, rslora: bool) -> float:
    return scale * (math.sqrt(rank) if rslora else rank)


def _unpaired(pairs: Mapping[str, Mapping[str, Any]], sides: str) -> dict[str, str]:
    return {
        module: f"has {next(iter(pair))} and no {(set(sides) - set(pair)).pop()}"
        for module, pair in pairs.items()
        if len(pair) < 2
    }


def _raise(path: Path, problems: Mapping[str, str]) -> None:
    if problems:
        lines = [f"{module}: {problem}" for module, problem in problems.items()]
        raise AdapterFileError(f"{path}: not a whole adapter:\n" + "\n".join(lines))


def _in_order(factors: Iterable[Factors]) -> list[Factors]:
    """Layer 2 before layer 10."""

    def key(factor: Factors) -> list[tuple[int, str]]:
        parts = re.split(r"(\d+)", factor.module)
        return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]

    return sorted(factors, key=key)


def _dtypes(tensors: Iterable[np.ndarray]) -> list[str]:
    return sorted({str(tensor.dtype) for tensor in tensors})


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
