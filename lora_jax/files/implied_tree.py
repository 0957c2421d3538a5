"""The tree that an adapter file itself implies, where its base is not at hand.

A file with torch's names is read onto a tree that has these very names for paths and torch's axes;
one of lora_jax says the shapes of its base.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax.core.errors import AdapterFileError
from lora_jax.core.layout import Layout
from lora_jax.core.weights import LoraWeight
from lora_jax.files import kinds, mlx, native, peft
from lora_jax.files.contained_factors import saved_whole
from lora_jax.files.disk.safetensors_file import headers
from lora_jax.files.naming import Entry, Naming
from lora_jax.files.peft import PeftConfig, tensor_names


@dataclasses.dataclass(frozen=True)
class Source:
    """Adapters, and the names that they can be written under."""

    adapters: Any  # an overlay of `base`
    base: Any  # a tree of shapes
    naming: Naming
    base_name: str | None = None
    config: PeftConfig | None = None
    complete: bool = False  # whether `base` is the whole of it, not the adapted leaves alone


def base_name(found: kinds.Found) -> str | None:
    """The name of the model that an adapter was made for, where its file says it."""
    if found.kind == kinds.PEFT:
        return peft.read_config(found.path).base_model_name_or_path
    if found.kind == kinds.MLX:
        name = kinds.read_json(found.path / kinds.CONFIG).get("model")
    else:
        metadata = native.read_metadata(found.path)["metadata"]
        name = metadata.get("model") if isinstance(metadata, dict) else None
    return name if isinstance(name, str) else None


def from_peft(path: Path) -> Source:
    """An adapter of PEFT's on the modules that it names."""
    config = peft.read_config(path)
    tensors = _shapes(path / kinds.PEFT_WEIGHTS)
    known = saved_whole(tensors, config)
    weights: dict[str, tuple[str, tuple[int, ...]]] = {}
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in tensors.items():
        part = tensor_names.part_of_name(name, tensors, known)
        if part is None:
            continue  # the reader names it among its problems
        if part.field:
            pairs.setdefault(part.module, {})[part.field] = shape
        else:
            weights[part.module] = "", shape
    for module, fields in pairs.items():
        found = _peft_weight(module, fields, config)
        if found is not None:
            weights[f"{module}.weight"] = found
    base, naming = _torch_tree(weights)
    adapters = peft.load(path, base, naming)
    return Source(adapters, base, naming, config.base_model_name_or_path, config)


def _peft_weight(
    module: str, fields: Mapping[str, tuple[int, ...]], config: PeftConfig
) -> tuple[str, tuple[int, ...]] | None:
    """The kind and the shape in torch of the weight that these tensors adapt."""
    rows = fields.get(tensor_names.ROWS)
    if rows is not None and len(rows) == 2:
        indices = config.trainable_token_indices
        every = (
            [i for x in indices.values() for i in x] if isinstance(indices, Mapping) else indices
        )
        return "embedding", (max(every or [0]) + 1, rows[1])
    for kind, ndims in (("embedding", (2,)), ("conv", (3, 4, 5)), ("linear", (2,))):
        a, b = (fields.get(ending) for ending in tensor_names.endings(kind))
        if a and b and len(a) in ndims:
            ins, out = a[1:], b[0]
            if kind == "linear" and config.fan_in_fan_out:
                kind = "conv1d"
            return kind, ((out, *ins) if kind in ("linear", "conv") else (*ins, out))
    return None


def from_mlx(path: Path) -> Source:
    """An adapter of mlx-lm's on the modules that it names."""
    tensors = _shapes(path / kinds.MLX_WEIGHTS)
    weights: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in tensors.items():
        module = name.removesuffix(".lora_a")
        b = tensors.get(f"{module}.lora_b", ())
        if module != name and len(shape) == len(b) == 2:
            kind = "embedding" if re.search(r"(^|\.)(embed_tokens|wte)$", module) else "linear"
            ends = shape[0], b[1]
            weights[f"{module}.weight"] = kind, ends if kind == "embedding" else ends[::-1]
    base, naming = _torch_tree(weights)
    adapters = mlx.load(path, base, naming)
    return Source(adapters, base, naming, base_name(kinds.Found(kinds.MLX, path)))


def from_native(path: Path, naming: Naming) -> Source:
    """An adapter of lora_jax's on the base that its header describes, or its factors imply."""
    header, shapes = native.read_metadata(path), _shapes(path)
    described = header["base"] if isinstance(header["base"], dict) else {}
    base = {leaf: _described(path, leaf, text) for leaf, text in described.items()}
    for leaf, record in header["layouts"].items():
        if leaf not in base:  # saved without its base; a leaf trained whole is never described
            shape = _implied(path, leaf, record, shapes)
            base[leaf] = jax.ShapeDtypeStruct(shape, np.float32)
    name = base_name(kinds.Found(kinds.NATIVE, path))
    return Source(native.load(path, base), base, naming, name, complete=bool(described))


def _implied(
    path: Path, leaf: str, record: Any, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...]:
    """The shape of the leaf that these factors, or this value, fit."""
    kind = record.get("kind") if isinstance(record, dict) else None
    if kind == "whole" and f"{leaf}.value" in shapes:
        return shapes[f"{leaf}.value"]
    if kind == "rows":
        raise AdapterFileError(
            f"{path}: rows of {leaf}, saved without the base: save it again with base="
        )
    try:
        a, b = (jax.ShapeDtypeStruct(shapes[f"{leaf}.{x}"], np.float32) for x in "ab")
        return LoraWeight(None, a, b, None, layout=Layout(record["axes"])).shape
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{path}: the tensors of {leaf} are damaged ({error})") from None


_DESCRIPTION = re.compile(r"(\w+)\[((?:\d+(?:,\d+)*)?)\](?::\w+)?")


def _described(path: Path, leaf: str, text: Any) -> jax.ShapeDtypeStruct:
    """`"float32[4,3]:1a2b"` as a shape."""
    match = _DESCRIPTION.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise AdapterFileError(f"{path}: the header's description of {leaf} is damaged: {text!r}")
    sizes = [int(size) for size in match[2].split(",") if size]
    return jax.ShapeDtypeStruct(tuple(sizes), match[1])


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in headers(path).tensors.items()}


def _torch_tree(
    weights: Mapping[str, tuple[str, tuple[int, ...]]],
) -> tuple[dict[str, jax.ShapeDtypeStruct], Naming]:
    """A flat tree that has torch's names for paths and torch's axes, and its naming."""
    rows = []
    for name, (kind, shape) in weights.items():
        axes = "o i" + "".join(f" k{n}" for n in range(len(shape) - 2))
        rows.append(
            Entry(name, name, kind, f"{axes} -> {axes}" if kind in ("linear", "conv") else "")
        )
    tree = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, (_, shape) in weights.items()}
    return tree, Naming(tuple(rows))
