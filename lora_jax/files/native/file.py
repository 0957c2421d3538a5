"""Native files, parsed: their header and the nodes of adapters, before there is a base."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.core.errors import AdapterFileError
from lora_jax.core.foreign import shown
from lora_jax.core.weights import Adapted
from lora_jax.files.disk import safetensors_file, strict_json
from lora_jax.files.disk.fingerprint import parse_entry
from lora_jax.files.native import schema
from lora_jax.files.stack_index import StackIndex, index_of

FORMAT, VERSION = "lora_jax", 1
STACK_VERSION = 2  # of a file with several adapters
MODEL = "model"  # the key of the base model's name in the metadata


@dataclasses.dataclass(frozen=True)
class NativeFile:
    """An adapter file, parsed; nothing is compared with a base yet."""

    path: str | os.PathLike
    header: dict[str, Any]  # "config", "layouts", "base" and "metadata"
    nodes: dict[str, Adapted]  # of numpy arrays, by path
    problems: list[str]  # what is wrong with the rest

    @property
    def base_model(self) -> str | None:
        """The base model's name, which the command line keeps in the metadata."""
        name = self.header["metadata"].get(MODEL)
        return name if isinstance(name, str) else None

    @property
    def use_rslora(self) -> bool:
        """Whether the scale is α/√rank, by the configuration kept with the file."""
        return (self.header["config"] or {}).get("scaling") == "rslora"

    def base_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of the base that the file was saved with; empty without one.

        Raises:
          AdapterFileError: an entry of the base's fingerprint is damaged.
        """
        entries = self.header["base"].items()
        found = {name: parse_entry(text) for name, text in entries}
        damaged = [f"{name}: {text!r}" for name, text in entries if found[name] is None]
        if damaged:
            raise AdapterFileError(
                f"{self.path}: the header's description of the base is damaged:\n"
                + strict_json.lines(damaged, "weights")
            )
        return {name: shape for name, shape in found.items() if shape is not None}


def read_file(path: str | os.PathLike, *, finite: bool = True) -> NativeFile:
    """Read one adapter without its base.

    Args:
      path: a file that `save` wrote, or an adapter in one, see `member_of`.
      finite: reject NaN and infinite values.

    Raises:
      AdapterFileError: the file is missing, truncated, not safetensors, not lora_jax's, or contains
        a stack of adapters of which none is named.
    """
    file, name = member_of(path)
    files, index = read_files(file, finite=finite)
    if name is not None:
        slot = _slot(file, index, name)
        return dataclasses.replace(files[slot], path=path)
    if index is not None:
        raise AdapterFileError(
            f"{path}: a stack of {len(files)} adapters ({index}), where one is needed; give one of "
            f"them: {os.path.join(path, index.names[0])}"
        )
    return files[0]


def member_of(path: str | os.PathLike) -> tuple[str | os.PathLike, str | None]:
    """Return a file, and the name of an adapter in it with which a path ends, or None.

    So a stack's file is named as its directory is: "all.safetensors/law", "all/law".
    """
    parent, name = os.path.split(path)
    return (parent, name) if name and os.path.isfile(parent) else (path, None)


def _slot(file: str | os.PathLike, index: StackIndex | None, name: str) -> int:
    """Return the slot of an adapter that is asked for by its name."""
    if index is None:
        raise AdapterFileError(f"{file}: one adapter, not a stack; leave out /{shown(name)}")
    index.choose(str(file), name)
    return index.names.index(name)


def read_files(
    path: str | os.PathLike, *, finite: bool = True
) -> tuple[list[NativeFile], StackIndex | None]:
    """Read the file of one adapter or of a stack; of a stack also its index.

    Raises:
      AdapterFileError: the file is missing, truncated, not safetensors, or not lora_jax's.
    """
    return _parsed(path, *safetensors_file.read(path, finite=finite))


def decode(path: str | os.PathLike, data: bytes) -> NativeFile:
    """Return the adapter in the bytes of a file, which `path` names.

    Raises:
      AdapterFileError: as `read_file`.
    """
    files, index = _parsed(path, *safetensors_file.decode(data, str(path), finite=True))
    if index is not None:
        raise AdapterFileError(f"{path}: a stack of adapters itself, in the directory of a stack")
    return files[0]


def _parsed(
    path: str | os.PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> tuple[list[NativeFile], StackIndex | None]:
    header = _header(path, metadata)
    index = header.pop("stack", None)
    if index is None:
        nodes, problems = _nodes(header["layouts"], tensors)
        return [NativeFile(path, header, nodes, problems)], None
    parts: dict[str, dict[str, np.ndarray]] = {name: {} for name in index.names}
    lost = []
    for tensor, x in tensors.items():
        name, _, rest = tensor.partition("/")
        if name in parts:
            parts[name][rest] = x
        else:
            lost.append(f"{tensor}: this tensor belongs to no adapter")
    files = []
    for name, own in parts.items():
        layouts = header["layouts"][name] or {}
        nodes, problems = _nodes(layouts, own)
        mine = header | {"layouts": layouts, "config": header["config"][name]}
        files.append(NativeFile(path, mine, nodes, [f"{name}: {x}" for x in problems] + lost))
        lost = []
    return files, index


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """Read the header of an adapter file: "config", "layouts", "base", and `save`'s "metadata".

    That of a stack also has "names", those of its adapters; "config" and "layouts" are by name.

    Args:
      path: a file that `save` wrote, or an adapter of a stack in one: "all.safetensors/law".

    Raises:
      AdapterFileError: the file is missing, truncated, not safetensors, or not lora_jax's.
    """
    file, name = member_of(path)
    header = _header(file, safetensors_file.headers(file).metadata)
    index = header.pop("stack", None)
    if name is not None:
        _slot(file, index, name)
        own = {field: header[field][name] for field in ("layouts", "config")}
        return header | own | {"layouts": own["layouts"] or {}}
    return header if index is None else header | {"names": list(index.names)}


def is_header(metadata: Mapping[str, str]) -> bool:
    """Return whether a safetensors file with this metadata is lora_jax's."""
    return metadata.get("format") == FORMAT


def _header(path: str | os.PathLike, header: Mapping[str, str]) -> dict[str, Any]:
    """Parse and check the metadata of a file; that of a stack has a "stack", a `StackIndex`."""
    if not is_header(header):
        raise AdapterFileError(
            f"{path}: a safetensors file, but not one that lora_jax.save wrote (its format is "
            f"{header.get('format')!r:.40})"
        )
    version = header.get("version")
    if version not in (str(VERSION), str(STACK_VERSION)):
        raise AdapterFileError(
            f"{path}: format version {version!r:.40} is not supported; this release reads versions "
            f"{VERSION} and, of stacks, {STACK_VERSION}"
        )
    fields: dict[str, tuple[type, ...]] = {
        "layouts": (dict,),
        "base": (dict,),
        "config": (dict, type(None)),
        "metadata": (dict,),
    }
    if version == str(STACK_VERSION):
        fields["stack"] = (dict,)
    damaged = f"{path}: the header is damaged"
    missing = [field for field in fields if field not in header]
    if missing:
        raise AdapterFileError(f"{damaged}: it lacks {', '.join(missing)}")
    parsed = {
        field: strict_json.parse_json(header[field], f"{damaged}: {field}") for field in fields
    }
    wrong = [field for field, types in fields.items() if not isinstance(parsed[field], types)]
    if wrong:
        raise AdapterFileError(f"{damaged}: must be a mapping: {', '.join(wrong)}")
    if not all(isinstance(checksum, str) for checksum in parsed["base"].values()):
        raise AdapterFileError(f"{damaged}: a fingerprint in base is not a string")
    if "stack" in parsed:
        parsed["stack"] = index_of(parsed["stack"], damaged)
        for field in ("layouts", "config"):
            _check_named(parsed[field], parsed["stack"].names, f"{damaged}: {field}")
    return parsed


def _check_named(found: Any, names: Sequence[str], source: str) -> None:
    """Raise unless a field of the header of a stack has a mapping, or null, for each adapter."""
    if not isinstance(found, dict) or found.keys() != {*names}:
        raise AdapterFileError(f"{source} must be a mapping from the names of the adapters")
    wrong = [name for name in names if not isinstance(found[name], dict | None)]
    if wrong:
        raise AdapterFileError(f"{source} is not a mapping for {', '.join(map(shown, wrong))}")


def _nodes(
    layouts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, Adapted], list[str]]:
    """Return the overlay's nodes by path, and what is wrong with the file."""
    nodes: dict[str, Adapted] = {}
    problems: list[str] = []
    left = set(tensors)
    for path, record in layouts.items():
        found = schema.record_problems(record)
        if not found:
            names = {field: f"{path}.{field}" for field in schema.FIELDS[record["kind"]]}
            missing = [name for name in names.values() if name not in tensors]
            left -= set(names.values())
            found = [f"tensors missing: {', '.join(missing)}"] if missing else []
        if not found:
            arrays = {field: tensors[name] for field, name in names.items()}
            found = schema.array_problems(record, arrays)
        if not found:
            nodes[path] = schema.make(record, arrays)
        problems += [f"{path}: {problem}" for problem in found]
    problems += [f"{name}: this tensor belongs to no layout" for name in sorted(left)]
    return nodes, problems
