"""Adapter files of mlx-lm: `adapters.safetensors` and `adapter_config.json`."""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.adapters.split import base_of
from lora_jax.core.checks import is_number
from lora_jax.core.errors import AdapterFileError, StructureError
from lora_jax.core.tree import adapted_nodes
from lora_jax.core.weights import LoraWeight
from lora_jax.files.disk import safetensors_file, strict_json
from lora_jax.files.naming import Entry, Naming, Place
from lora_jax.files.torch_adapters.contents import Contents, Model, is_floating, module_of, unknown
from lora_jax.files.torch_adapters.factors import Factors
from lora_jax.files.torch_adapters.from_tree import taken
from lora_jax.files.torch_adapters.to_tree import fitted

__all__ = ["CONFIG", "TENSORS", "load", "save"]

CONFIG, TENSORS = "adapter_config.json", "adapters.safetensors"
_NEITHER = "is no linear layer and no embedding"
_FIELDS = {"lora_a": "a", "lora_b": "b", "m": "magnitude"}


def load(
    directory: str | os.PathLike,
    base: Any,
    naming: Naming,
    *,
    strict: bool = True,
    dtype: Any = None,
) -> Any:
    """The adapters that mlx-lm trained, as an overlay of `base`.

    Its modules are called as in Hugging Face's files, so the same naming serves. `lora_a` is
    `[in, rank]` and `lora_b` `[rank, out]`; the update is `scale · lora_a · lora_b`, the scale one
    number for all (https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/tuner/lora.py). With
    `fine_tune_type` "dora" there is a magnitude `m` too: for every output of a linear layer, and
    for every row of an embedding, which therefore gets the layout "oi", its rows as outputs.

    Args:
      directory: with `adapter_config.json` and `adapters.safetensors`.
      base, naming, strict, dtype: as for `lora_jax.peft.load`.

    Raises:
      AdapterFileError: a file is missing or damaged, or its tensors do not fit the base: all at
        once.

    >>> import tempfile, jax, jax.numpy as jnp, lora_jax
    >>> from lora_jax.files.naming import Entry
    >>> base = {"up": {"kernel": jnp.ones((4, 3))}}
    >>> params = lora_jax.init(jax.random.key(0), base, lora_jax.LoraConfig(rank=2, alpha=4))
    >>> naming = Naming((Entry("{*m}.weight", "{*m}/kernel", "linear"),))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, params, naming)
    ...     adapters = load(folder, base, naming)
    >>> adapters["up"]["kernel"].a.shape, float(adapters["up"]["kernel"].scale)
    ((4, 2), 2.0)
    """
    base = base_of(base)
    files = _files(directory)
    settings = _settings(files[CONFIG], Path(directory) / CONFIG)
    source = Path(directory) / TENSORS
    tensors, _ = safetensors_file.decode(files[TENSORS], str(source), finite=True)
    model = Model(base, naming)
    embeddings = {name for name in model.adaptable() if model.kind(name) == "embedding"}
    if settings[1]:
        lookups = [entry for entry in naming.entries if entry.kind == "embedding"]
        model = Model(base, _with_rows_as_outputs(naming, lookups))
    contents, problems = _contents(tensors, *settings, model, embeddings)
    return fitted(source, contents, problems, model, strict=strict, dtype=dtype)


def _files(directory: str | os.PathLike) -> dict[str, bytes]:
    try:
        files = safetensors_file.read_directory(directory, [CONFIG, TENSORS])
    except OSError as error:
        raise AdapterFileError(f"{directory}: cannot be read: {error.strerror}") from None
    for name in (CONFIG, TENSORS):
        if name not in files:
            raise AdapterFileError(f"{Path(directory) / name}: there is no such file")
    return files


def _settings(text: bytes, path: Path) -> tuple[float, bool]:
    """The scale, and whether it is DoRA."""
    values = strict_json.parse_json(text, str(path))
    values = values if isinstance(values, dict) else {}
    kind = values.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise AdapterFileError(f"{path}: fine_tune_type must be lora or dora, got {kind!r}")
    parameters = values.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if not is_number(scale) or not abs(scale) < 1e30:
        raise AdapterFileError(f"{path}: lora_parameters.scale must be a number, got {scale!r}")
    return float(scale), kind == "dora"


def _contents(
    tensors: Mapping[str, np.ndarray],
    scale: float,
    dora: bool,
    model: Model,
    embeddings: Collection[str],
) -> tuple[Contents, list[str]]:
    found, problems = Contents(), []
    by_module: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        module, _, ending = name.rpartition(".")
        field = _FIELDS.get(ending)
        if field is None or (field == "magnitude" and not dora):
            problems.append(f"{name}: unexpected")
        elif f"{module}.weight" not in model.index:
            problems.append(f"{name}: {unknown(module + '.weight', model.index)}")
        elif model.has_experts(f"{module}.weight"):
            problems.append(f"{name}: experts' parameters are not read")
        elif not is_floating(tensor):
            problems.append(f"{name}: is {tensor.dtype}, only floating tensors are trained")
        else:
            by_module.setdefault(module, {})[field] = tensor
    for module, arrays in by_module.items():
        weight = f"{module}.weight"
        needed = ("a", "b", "magnitude") if dora else ("a", "b")
        missing = [end for end, field in _FIELDS.items() if field in set(needed) - arrays.keys()]
        shape = model.shape(weight)
        kind = "embedding" if weight in embeddings else model.kind(weight)
        problem = None if missing else _misshaped(arrays, kind, shape)
        problems += [f"{module}.{ending}: missing" for ending in missing]
        problems += [f"{module}: {problem}"] if problem else []
        if not missing and not problem:
            a, b = arrays["a"].T, arrays["b"].T
            if dora and weight in embeddings:
                a, b = b.T, a.T
            found.factors[weight] = Factors(a, b, scale, arrays.get("magnitude"))
    return found, problems


def _misshaped(arrays: Mapping[str, np.ndarray], kind: str, shape: tuple[int, ...]) -> str | None:
    if kind not in ("linear", "embedding"):
        return _NEITHER
    ins, out = shape if kind == "embedding" else shape[::-1]
    rank = arrays["a"].shape[-1] if arrays["a"].ndim else 0
    wanted = {"a": (ins, rank), "b": (rank, out), "magnitude": shape[:1]}
    got = {field: array.shape for field, array in arrays.items()}
    if rank and all(got[field] == wanted[field] for field in got):
        return None
    return f"has shapes {sorted(got.values())}, the weight {shape} needs (in, rank), (rank, out)"


def _unsupported(kind: str, dora: bool) -> str | None:
    """What keeps a module of this kind out of these files."""
    if kind not in ("linear", "embedding"):
        return _NEITHER
    if dora and kind == "embedding":
        return (
            "is an embedding with a magnitude for each column, and mlx-lm has one for each row: "
            'give it the layout "oi" in overrides='
        )
    return None


def _with_rows_as_outputs(naming: Naming, lookups: Sequence[Entry]) -> Naming:
    """The naming with these embeddings' rows as outputs, as they are of a head tied to them."""
    return Naming(
        tuple(
            dataclasses.replace(entry, kind="linear", axes=entry.axes or "n d -> n d")
            if entry in lookups
            else entry
            for entry in naming.entries
        )
    )


def save(
    directory: str | os.PathLike,
    adapters: Any,
    naming: Naming,
    *,
    base: Any = None,
    base_model: str | None = None,
) -> None:
    """Write adapters as mlx-lm does, so that its `--adapter-path` takes them.

    mlx-lm knows one rank and one scale: factors are padded with zeros to the largest rank, and
    scales that differ from the most common one are multiplied into B.

    Args:
      directory: made where it is missing; an older pair of files is replaced as a whole.
      adapters: an overlay, or a joined tree, which brings its base along.
      naming: which torch tensor is which leaf.
      base: the base of an overlay, arrays or `ShapeDtypeStruct`s.
      base_model: the name or path of the base, to keep with the file.

    Raises:
      StructureError: what cannot be in such a file, all at once: leaves trained whole or in rows,
        convolutions, DoRA of an embedding in another layout than "oi", paths that the naming does
        not have.
      OSError: the files cannot be written; the old ones stand.

    >>> import tempfile, jax, jax.numpy as jnp, lora_jax
    >>> from lora_jax.files.naming import Entry
    >>> naming = Naming((Entry("{*m}.weight", "{*m}/kernel", "linear"),))
    >>> config = lora_jax.LoraConfig(rank=2, alpha=4)
    >>> params = lora_jax.init(jax.random.key(0), {"up": {"kernel": jnp.ones((4, 3))}}, config)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, params, naming)
    ...     json.loads((Path(folder) / CONFIG).read_text())["lora_parameters"]["scale"]
    2.0
    """
    turned = _turned(adapters, naming)
    lookups = [place.entry for place in turned]
    contents, model = taken(adapters, _with_rows_as_outputs(naming, lookups), base)
    others = [*contents.whole, *contents.rows]
    problems = [f"{name}: is trained itself; mlx-lm's files hold factors" for name in others]
    problems += [f"{name}: experts' parameters are not written" for name in contents.experts]
    for name, one in contents.factors.items():
        problem = _unsupported(model.kind(name), one.magnitude is not None)
        problems += [f"{name}: {problem}"] if problem else []
    dora = {factors.magnitude is not None for factors in contents.factors.values()}
    problems += ["DoRA on some modules alone"] if len(dora) > 1 else []
    if problems or not dora:
        lines = "\n".join(sorted(problems)) or "no module has factors"
        raise StructureError(f"save: an mlx-lm file cannot hold these adapters:\n{lines}")
    scale, factors = _uniform(contents.factors)
    (rank,) = {one.rank for one in factors.values()}
    settings = {
        "fine_tune_type": "dora" if True in dora else "lora",
        "num_layers": -1,  # all: where nothing was adapted, the update is zero
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": 0.0,
            "keys": sorted({_key(module_of(name)) for name in factors}),
        },
    }
    settings |= {} if base_model is None else {"model": base_model}
    tensors: dict[str, np.ndarray] = {}
    by_rows = {name for place in turned for _, names in place.layers() for name in names}
    for name, one in factors.items():
        a, b = (one.b, one.a) if name in by_rows else (one.a.T, one.b.T)
        arrays = {"lora_a": a, "lora_b": b, "m": one.magnitude}
        tensors |= {f"{module_of(name)}.{k}": x for k, x in arrays.items() if x is not None}
    files = {
        CONFIG: json.dumps(settings, indent=4, sort_keys=True).encode(),
        TENSORS: safetensors_file.encode(tensors, {"format": "mlx"}),
    }
    safetensors_file.write_directory(directory, files)


def _turned(adapters: Any, naming: Naming) -> list[Place]:
    """Embeddings with DoRA whose rows are the outputs."""
    nodes = {
        path: node
        for path, node in adapted_nodes(adapters).items()
        if isinstance(node, LoraWeight) and node.magnitude is not None
    }
    places = naming.places({path: node.shape for path, node in nodes.items()})
    return [
        place
        for path, place in places.items()
        if place.entry.kind == "embedding" and place.entry.layout != nodes[path].layout.axes
    ]


def _uniform(factors: Mapping[str, Factors]) -> tuple[float, dict[str, Factors]]:
    """The most common scale, and factors that all have it and the same rank."""
    ((scale, _),) = Counter(one.scale for one in factors.values()).most_common(1)
    rank = max(one.rank for one in factors.values())
    equal = {}
    for name, one in factors.items():
        if one.scale != scale:
            one = dataclasses.replace(one, scale=one.scale / scale).folded()
        equal[name] = dataclasses.replace(one.padded(rank), scale=scale)
    # a number that prints as it was meant, where float32 holds it as well
    return float(np.format_float_positional(np.float32(scale), unique=True)), equal


def _key(module: str) -> str:
    """A module's name within its layer, as mlx-lm's `keys` have it."""
    segments = module.split(".")
    numbers = [i for i, segment in enumerate(segments) if segment.isdigit()]
    return ".".join(segments[numbers[0] + 1 :]) if numbers else module
