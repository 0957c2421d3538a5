"""lora_jax's own adapter files: one safetensors file, complete or absent."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from lora_jax import _paths
from lora_jax.config import LoraConfig
from lora_jax.errors import AdapterFileError, LayoutError, StructureError
from lora_jax.fingerprint import differences, fingerprint
from lora_jax.overlay import adapted_nodes, split
from lora_jax.weights import (
    Adapted,
    Layout,
    LoraWeight,
    TrainedLeaf,
    TrainedRows,
    check_fits,
    is_adapted,
)

FORMAT, VERSION = "lora_jax", 1


def save(
    path: str | os.PathLike,
    adapters: Any,
    metadata: Mapping[str, Any] | None = None,
    *,
    base: Any = None,
    config: LoraConfig | None = None,
) -> None:
    """Write adapters to one safetensors file, beside `path` and then renamed into place.

    Tensors are named by path and field: "block_0/attn/query/kernel.a", ".b", ".scale", ".magnitude"
    with DoRA, and ".value" for a leaf trained whole or in rows. The header holds the layouts, the
    configuration, `metadata`, and a fingerprint of the base, by which `load` refuses another one.

    Args:
      path: the file; an existing one is replaced in one step.
      adapters: an overlay, or a joined tree, which brings its base along.
      metadata: JSON values of your own, given back by `read_metadata`.
      base: the base of an overlay, to fingerprint; without it the file records shapes and dtypes of
        the adapted weights only.
      config: the configuration, to keep with the file.

    Raises:
      StructureError: there are no adapters, a value is still abstract, or `base` does not fit.
      TypeError: `metadata` holds what JSON cannot.

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
    nodes = adapted_nodes(adapters)
    if not nodes:
        raise StructureError("save: the tree holds no adapters")
    if base is None and all(node.w is not None for node in nodes.values()):
        base, _ = split(adapters)
    whole = {p for p, node in nodes.items() if isinstance(node, TrainedLeaf)}
    if base is not None:
        leaves, _ = _paths.flatten_with_paths(base)
        problems = [
            line
            for p, node in nodes.items()
            for line in (
                check_fits(p, node, leaves[p]) if p in leaves else [f"{p}: not in the base"]
            )
        ]
        if problems:
            raise StructureError("save: the adapters do not fit the base:\n" + "\n".join(problems))
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "layouts": json.dumps({p: _layout_record(node) for p, node in nodes.items()}),
        "base": json.dumps({} if base is None else fingerprint(base, skip=whole)),
        "config": json.dumps(config.to_dict() if config is not None else None),
        "metadata": json.dumps(dict(metadata or {})),
    }
    write_atomically(Path(path), serialize(_tensors(nodes), header))


def _layout_record(node: Adapted) -> dict[str, Any]:
    if isinstance(node, TrainedLeaf):
        return {"kind": "whole"}
    record = {"kind": _kind(node), "axes": node.layout.axes, "uses": list(node.layout.uses)}
    if isinstance(node, TrainedRows):
        return record | {"rows": list(node.rows)}
    return record | ({"dropout": node.dropout} if node.dropout else {})


_FIELDS = {
    "lora": ("a", "b", "scale"),
    "dora": ("a", "b", "scale", "magnitude"),
    "whole": ("value", "scale"),
    "rows": ("value", "scale"),
}


def _kind(node: Adapted) -> str:
    if isinstance(node, TrainedLeaf | TrainedRows):
        return "whole" if isinstance(node, TrainedLeaf) else "rows"
    return "lora" if node.magnitude is None else "dora"


def _tensors(nodes: Mapping[str, Adapted]) -> dict[str, np.ndarray]:
    arrays = {
        f"{path}.{field}": getattr(node, field)
        for path, node in nodes.items()
        for field in _FIELDS[_kind(node)]
    }
    abstract = [name for name, x in arrays.items() if isinstance(x, jax.ShapeDtypeStruct)]
    if abstract:
        raise StructureError("save: no values yet, only shapes: " + ", ".join(abstract))
    return {name: np.asarray(x, order="C") for name, x in jax.device_get(arrays).items()}


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that, whatever happens, the old one or the new one is there whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The header of an adapter file: "config", "layouts", "base" and the "metadata" of `save`.

    Raises:
      AdapterFileError: the file is missing, truncated, not safetensors, or not lora_jax's.
    """
    return _read(path)[0]


def load(path: str | os.PathLike, base: Any) -> Any:
    """The adapters in a file, as an overlay of `base`: `join(base, load(path, base))` runs.

    Args:
      path: a file that `save` wrote.
      base: the parameter tree that the adapters were trained on (or a joined tree, whose own base
        counts). Where its leaves have values they must be those the file was made with.

    Raises:
      AdapterFileError: the file is missing, truncated, not safetensors, not lora_jax's, or made for
        another base. All differences are listed at once.
    """
    if adapted_nodes(base):
        base, _ = split(base)
    header, tensors = _read(path)
    nodes, problems = _nodes(header["layouts"], tensors)
    leaves, treedef = _paths.flatten_with_paths(base, is_leaf=is_adapted)
    for name, node in nodes.items():
        if name not in leaves:
            problems.append(f"{name}: not in this base; {_paths.nearest(name, leaves)}")
        else:
            problems += check_fits(name, node, leaves[name])
    if header["base"] and not problems:
        whole = {name for name, node in nodes.items() if isinstance(node, TrainedLeaf)}
        problems += differences(header["base"], fingerprint(base, skip=whole))
    if problems:
        raise AdapterFileError(
            f"{path}: the adapters in this file do not fit this base:\n" + "\n".join(problems)
        )
    return jax.tree_util.tree_unflatten(treedef, [nodes.get(name) for name in leaves])


def _read(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        with safe_open(os.fspath(path), framework="np") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise AdapterFileError(f"{path}: there is no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(f"{path}: not a whole safetensors file ({error})") from None
    if header.get("format") != FORMAT:
        raise AdapterFileError(
            f"{path}: a safetensors file, but not one that lora_jax.save wrote (its header says "
            f"format={header.get('format')!r})"
        )
    if header.get("version") != str(VERSION):
        raise AdapterFileError(
            f"{path}: version {header.get('version')!r} of the format; this release reads {VERSION}"
        )
    try:
        parsed = {k: json.loads(header[k]) for k in ("layouts", "base", "config", "metadata")}
    except (KeyError, json.JSONDecodeError) as error:
        raise AdapterFileError(f"{path}: the header is damaged ({error!r})") from None
    if not isinstance(parsed["layouts"], dict) or not isinstance(parsed["base"], dict):
        raise AdapterFileError(f"{path}: the header is damaged (layouts or base is no mapping)")
    return parsed, tensors


def _nodes(
    layouts: Mapping[str, Any], tensors: dict[str, np.ndarray]
) -> tuple[dict[str, Adapted], list[str]]:
    """The overlay's nodes by path, and what is wrong with the tensors."""
    nodes: dict[str, Adapted] = {}
    problems: list[str] = []
    left = set(tensors)
    for path, record in layouts.items():
        kind = record.get("kind") if isinstance(record, dict) else None
        if kind not in _FIELDS:
            problems.append(f"{path}: unknown kind of adapter {kind!r}")
            continue
        names = {field: f"{path}.{field}" for field in _FIELDS[kind]}
        missing = [name for name in names.values() if name not in tensors]
        left -= set(names.values())
        if missing:
            problems.append(f"{path}: tensors missing: {', '.join(missing)}")
            continue
        arrays = {field: jnp.asarray(tensors[name]) for field, name in names.items()}
        try:
            nodes[path] = _node(record, arrays)
        except (LayoutError, TypeError, KeyError) as error:
            problems.append(f"{path}: {error}")
    problems += [f"{name}: a tensor that no layout names" for name in sorted(left)]
    return nodes, problems


def _node(record: Mapping[str, Any], arrays: Mapping[str, jax.Array]) -> Adapted:
    if record["kind"] == "whole":
        return TrainedLeaf(None, **arrays)
    layout = Layout(record["axes"], tuple(record["uses"]))
    if record["kind"] == "rows":
        return TrainedRows(None, **arrays, rows=tuple(map(int, record["rows"])), layout=layout)
    return LoraWeight(None, **arrays, layout=layout, dropout=float(record.get("dropout", 0.0)))
