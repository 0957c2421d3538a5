"""lora_jax's adapter files: one safetensors file, written completely or not at all."""

import dataclasses
import json
import os
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.split import base_of, split
from lora_jax.core.config import LoraConfig
from lora_jax.core.errors import (
    AdapterFileError,
    BaseKindWarning,
    StructureError,
    grouped,
    warn_user,
)
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.patterns import nearest
from lora_jax.core.sharding.placement import Placement
from lora_jax.core.tree import require_adapted
from lora_jax.core.weights import Adapted, TrainedLeaf, check_fits, is_adapted
from lora_jax.files import native_schema
from lora_jax.files.disk import processes, safetensors_file, strict_json
from lora_jax.files.disk.fingerprint import (
    differences,
    fingerprint,
    parse_entry,
    recoded,
    weak_entries,
)

FORMAT, VERSION = "lora_jax", 1
MODEL = "model"  # the key of the base model's name in the metadata
_SUGGESTED = 5  # unknown paths that are shown with the nearest ones, which take time to find


def save(
    path: str | os.PathLike,
    adapters: Any,
    metadata: Mapping[str, Any] | None = None,
    *,
    base: Any = None,
    config: LoraConfig | None = None,
) -> None:
    """Write adapters to one safetensors file, completely or not at all.

    Tensors are named by path and field: "block_0/attn/query/kernel.a", ".b", ".scale", ".magnitude"
    with DoRA, and ".value" for a leaf that is fully trained or has trained rows. The header
    contains the layouts, the configuration, `metadata`, and a fingerprint of the base, so that
    `load` can reject another base.

    Where arrays span processes, all processes call this together, and process 0 writes.

    Args:
      path: the file; an existing one is replaced in one step.
      adapters: an overlay, or a joined tree, which brings its own base.
      metadata: custom JSON values, returned by `read_metadata`.
      base: the base of an overlay, to fingerprint. Without it the file records only the adapters.
      config: the configuration, to keep with the file.

    Raises:
      StructureError: the tree contains no adapters, a value is abstract, NaN or infinite, or
        `base` does not fit.
      TypeError: `metadata` contains something that JSON cannot represent.
      OtherProcessError: process 0 cannot write the file; it raises the `OSError`.

    >>> import tempfile, jax, jax.numpy as jnp, lora_jax
    >>> config = lora_jax.LoraConfig(rank=1)
    >>> params = lora_jax.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, config)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/a.safetensors", params, {"task": "mine"}, config=config)
    ...     adapters = load(f"{folder}/a.safetensors", {"kernel": jnp.ones((4, 3))})
    ...     read_metadata(f"{folder}/a.safetensors")["metadata"]
    {'task': 'mine'}
    >>> adapters["kernel"].a.shape
    (4, 1)
    """
    nodes = require_adapted("save", adapters)
    if base is None and all(node.w is not None for node in nodes.values()):
        base, _ = split(adapters)
    whole = {p for p, node in nodes.items() if isinstance(node, TrainedLeaf)}
    if base is not None:
        leaves, _ = flatten_with_paths(base)
        problems = [
            line
            for p, node in nodes.items()
            for line in (
                check_fits(p, node, leaves[p]) if p in leaves else [f"{p}: not in the base"]
            )
        ]
        if problems:
            raise StructureError("save: the adapters do not fit the base:\n" + grouped(problems))
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "layouts": json.dumps({p: native_schema.record(node) for p, node in nodes.items()}),
        "base": json.dumps({} if base is None else fingerprint(base, skip=whole)),
        "config": json.dumps(config.to_dict() if config is not None else None),
        "metadata": json.dumps(dict(metadata or {})),
    }
    tensors = _tensors(nodes)
    processes.by_first(
        lambda: safetensors_file.write(path, tensors, header),
        several=processes.span_processes(adapters, base),
    )


def _tensors(nodes: Mapping[str, Adapted]) -> dict[str, np.ndarray]:
    arrays = {
        f"{path}.{field}": getattr(node, field)
        for path, node in nodes.items()
        for field in native_schema.FIELDS[native_schema.kind(node)]
    }
    abstract = [name for name, x in arrays.items() if isinstance(x, jax.ShapeDtypeStruct)]
    if abstract:
        raise StructureError(
            "save: these are abstract (ShapeDtypeStruct), without values: " + ", ".join(abstract)
        )
    values: dict[str, np.ndarray] = processes.to_host(arrays)
    bad = [name for name, x in values.items() if not np.isfinite(x).all()]
    if bad:  # `load` would reject them
        raise StructureError("save: NaN or infinite values in " + ", ".join(bad))
    return values


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
    """Read an adapter file without its base.

    Args:
      path: a file that `save` wrote.
      finite: reject NaN and infinite values.

    Raises:
      AdapterFileError: the file is missing, truncated, not safetensors, or not lora_jax's.
    """
    tensors, metadata = safetensors_file.read(path, finite=finite)
    header = _header(path, metadata)
    nodes, problems = _nodes(header["layouts"], tensors)
    return NativeFile(path, header, nodes, problems)


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """Read the header of an adapter file: "config", "layouts", "base", and `save`'s "metadata".

    Raises:
      AdapterFileError: the file is missing, truncated, not safetensors, or not lora_jax's.
    """
    return _header(path, safetensors_file.headers(path).metadata)


def load(path: str | os.PathLike, base: Any, *, fsdp: str | Sequence[str] | None = None) -> Any:
    """Load the adapters in a file as an overlay of `base`, as in `join(base, load(path, base))`.

    Args:
      path: a file that `save` wrote.
      base: the parameter tree that the adapters were trained on, or a joined tree, of which only
        the base is used. Concrete leaves must have the values that the file was saved with. A
        quantized leaf may have been floating there, or the other way round: unless its values are
        the same, a `BaseKindWarning` tells so.
      fsdp: the names of the mesh axes that shard weights only to save memory. On a mesh factors
        are sharded as their weights are, but not along these; None stands for `data`, `fsdp`, `dp`,
        `ddp`, `batch` and `replica`, see `shardings`.

    Raises:
      AdapterFileError: the file is missing, damaged (NaN and infinite values count as damage), not
        lora_jax's, or made for another base. All differences are listed at once.
    """
    return fit(read_file(path), base, fsdp)


def fit(file: NativeFile, base: Any, fsdp: str | Sequence[str] | None = None) -> Any:
    """Return the adapters of a file as an overlay of `base`; what `load` does after reading."""
    base = base_of(base)
    leaves, treedef = flatten_with_paths(base, is_leaf=is_adapted)
    nodes, problems = _with_todays_names(file.nodes, leaves), list(file.problems)
    unknown = [name for name in nodes if name not in leaves]
    problems += _tell_prefix(unknown, leaves) or [
        f"{name}: not in this base"
        + (f"; {nearest(name, leaves)}" if name in unknown[:_SUGGESTED] else "")
        for name in unknown
    ]
    for name, node in nodes.items():
        problems += [f"{name}: {line}" for line in native_schema.dtype_problems(node)]
        problems += check_fits(name, node, leaves[name]) if name in leaves else []
    if file.header["base"] and not problems:
        whole = {name for name, node in nodes.items() if isinstance(node, TrainedLeaf)}
        saved = _with_todays_names(file.header["base"], leaves)
        weak = weak_entries(saved)
        found = fingerprint(base, skip=whole, weak=weak)
        problems += differences(saved, found)
        if not problems:
            _tell_recoded(file.path, recoded(saved, found))
        if weak and not problems:
            warnings.warn(
                f"{file.path}: an older release wrote this file. The base passed its check, the "
                "sum of the weights' bits, which does not see an even number of changed signs; "
                "save the adapters again for the check of every bit",
                UserWarning,
                stacklevel=3,
            )
    if problems:
        raise AdapterFileError(
            f"{file.path}: the adapters in this file do not fit this base:\n"
            + strict_json.lines(problems, "weights")
        )
    placement = Placement.of("load", leaves.values(), fsdp)
    in_jax = {
        name: placement.place(jax.tree.map(jnp.asarray, node), leaves[name])
        for name, node in nodes.items()
    }
    return jax.tree_util.tree_unflatten(treedef, [in_jax.get(name) for name in leaves])


def _tell_recoded(path: str | os.PathLike, lines: Sequence[str]) -> None:
    """Warn of the weights that are quantized here and not where the adapters were trained."""
    if lines:
        warn_user(
            f"{path}: the base is quantized in another way than the one that the adapters were "
            f"trained on:\n{strict_json.lines(lines, 'weights')}\nThe outputs differ by what "
            "quantization loses. For those of the training, load the file on a base of that kind: "
            "see lora_jax.quantize",
            BaseKindWarning,
        )


def _with_todays_names(found: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file says by path, under the paths of this base.

    Older releases left a last name `value` out of a path, whatever class had it.
    """
    longer = {path: f"{path}/value" for path in found if path not in leaves}
    return {longer[p] if longer.get(p) in leaves else p: value for p, value in found.items()}


def _tell_prefix(unknown: Sequence[str], leaves: Collection[str]) -> list[str]:
    """Return one line where all these paths have a module too much or too little, else none."""
    for path in leaves if unknown else ():
        prefix = path.removesuffix(unknown[0])
        if prefix != path and prefix.endswith("/") and all(prefix + x in leaves for x in unknown):
            return [
                f"{len(unknown)} paths, such as {unknown[0]}, are in the base's {prefix}: load the "
                "file on that part of the base"
            ]
    for end in re.finditer("/", unknown[0] if unknown else ""):
        prefix = unknown[0][: end.end()]
        if all(x.startswith(prefix) and x.removeprefix(prefix) in leaves for x in unknown):
            whole = "".join(f"{{{part!r}: " for part in prefix.strip("/").split("/"))
            return [
                f"{len(unknown)} paths, such as {unknown[0]}, begin with {prefix}, which the "
                f"base's do not: load the file on {whole}base{'}' * prefix.count('/')}"
            ]
    return []


def is_header(metadata: Mapping[str, str]) -> bool:
    """Return whether a safetensors file with this metadata is lora_jax's."""
    return metadata.get("format") == FORMAT


def _header(path: str | os.PathLike, header: Mapping[str, str]) -> dict[str, Any]:
    """Parse and check the metadata of a file."""
    if not is_header(header):
        raise AdapterFileError(
            f"{path}: a safetensors file, but not one that lora_jax.save wrote (its format is "
            f"{header.get('format')!r:.40})"
        )
    if header.get("version") != str(VERSION):
        raise AdapterFileError(
            f"{path}: format version {header.get('version')!r:.40} is not supported; this release "
            f"reads version {VERSION}"
        )
    fields: dict[str, tuple[type, ...]] = {
        "layouts": (dict,),
        "base": (dict,),
        "config": (dict, type(None)),
        "metadata": (dict,),
    }
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
    return parsed


def _nodes(
    layouts: Mapping[str, Any], tensors: dict[str, np.ndarray]
) -> tuple[dict[str, Adapted], list[str]]:
    """Return the overlay's nodes by path, and what is wrong with the file."""
    nodes: dict[str, Adapted] = {}
    problems: list[str] = []
    left = set(tensors)
    for path, record in layouts.items():
        found = native_schema.record_problems(record)
        if not found:
            names = {field: f"{path}.{field}" for field in native_schema.FIELDS[record["kind"]]}
            missing = [name for name in names.values() if name not in tensors]
            left -= set(names.values())
            found = [f"tensors missing: {', '.join(missing)}"] if missing else []
        if not found:
            arrays = {field: tensors[name] for field, name in names.items()}
            found = native_schema.array_problems(record, arrays)
        if not found:
            nodes[path] = native_schema.make(record, arrays)
        problems += [f"{path}: {problem}" for problem in found]
    problems += [f"{name}: this tensor belongs to no layout" for name in sorted(left)]
    return nodes, problems
