"""`save`: adapters as native files, one, or a stack of them in one file or in a directory."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.adapters.split import split
from lora_jax.core.config import LoraConfig
from lora_jax.core.errors import ConfigError, StructureError, grouped
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.slots import all_unpadded
from lora_jax.core.tree import adapted_nodes, require_adapted, unwrapped
from lora_jax.core.weights import Adapted, TrainedLeaf, check_fits
from lora_jax.files.disk import processes, safetensors_file
from lora_jax.files.disk.atomic import Content, write_directory
from lora_jax.files.disk.fingerprint import fingerprint
from lora_jax.files.native import schema
from lora_jax.files.native.file import FORMAT, STACK_VERSION, VERSION
from lora_jax.files.native.load import SUFFIX
from lora_jax.files.stack_index import INDEX, StackIndex, named_adapters


def save(
    path: str | os.PathLike,
    adapters: Any,
    metadata: Mapping[str, Any] | None = None,
    *,
    base: Any = None,
    config: LoraConfig | Sequence[LoraConfig | None] | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Write adapters to one safetensors file, completely or not at all.

    Tensors are named by path and field: "block_0/attn/query/kernel.a", ".b", ".scale", ".magnitude"
    with DoRA, and ".value" for a leaf that is fully trained or has trained rows. The header
    contains the layouts, the configuration, `metadata`, and a fingerprint of the base, so that
    `load` can reject another base.

    A stack of adapters becomes one file if `path` ends in ".safetensors". Otherwise `path` is a
    directory, which gets a file for each adapter, "name.safetensors", as if it had been saved
    alone, and `stack.json` with their order; other files there stay. All of them are replaced in
    one step. Each adapter is written with its own rank, targets, dropout and kind, without padding.

    Where arrays span processes, all processes call this together, and process 0 writes.

    Args:
      path: the file, or the directory of a stack; existing files are replaced in one step.
      adapters: an overlay, or a joined tree, which brings its own base; or a stack of either; or a
        model of `lora_jax.nnx` or `lora_jax.equinox`.
      metadata: custom JSON values, returned by `read_metadata`.
      base: the base of an overlay, to fingerprint. Without it the file records only the adapters.
      config: the configuration, to keep with the file; of a stack one for all, or one for each.
      names: the names of a stack's adapters, by default their numbers.

    Raises:
      StructureError: the tree contains no adapters, a value is abstract, NaN or infinite, or
        `base` does not fit.
      ConfigError: `names` or `config` does not fit the stack, or the adapters are not a stack.
      TypeError: `metadata` contains something that JSON cannot represent.
      OtherProcessError: process 0 cannot write the file; it raises the `OSError`.

    >>> import tempfile, jax, jax.numpy as jnp, lora_jax
    >>> config = lora_jax.LoraConfig(rank=1)
    >>> params = lora_jax.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, config)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/a.safetensors", params, {"task": "mine"}, config=config)
    ...     adapters = lora_jax.load(f"{folder}/a.safetensors", {"kernel": jnp.ones((4, 3))})
    ...     lora_jax.read_metadata(f"{folder}/a.safetensors")["metadata"]
    {'task': 'mine'}
    >>> adapters["kernel"].a.shape
    (4, 1)
    """
    adapters = unwrapped(adapters)
    nodes = require_adapted("save", adapters)
    _refuse_abstract(nodes)
    overlay = adapters
    if all(node.w is not None for node in nodes.values()):
        own, overlay = split(adapters)
        base = own if base is None else base
    if base is not None:
        _check_base(nodes, base)
    stacked = any(node.slots is not None for node in nodes.values())
    if stacked:
        index, trees = named_adapters("save", overlay, names)
    elif names is not None:
        raise ConfigError("save: names are for a stack of adapters, and this is a single one")
    else:
        index, trees = StackIndex(("",)), {"": overlay}
    each = {name: all_unpadded(adapted_nodes(tree)) for name, tree in trees.items()}
    if not stacked and not each[""]:
        raise StructureError("save: this slot of a stack has no adapter")
    contents = _Contents(
        {name: _tensors(name, own) for name, own in each.items()},
        {name: {p: schema.record(node) for p, node in own.items()} for name, own in each.items()},
        _entries(base, each),
        _configs(config, index),
        dict(metadata or {}),
    )
    processes.by_first(
        contents.writer(path, index if stacked else None),
        several=processes.span_processes(adapters, base),
    )


@dataclasses.dataclass(frozen=True)
class _Contents:
    """What is written: by the name of each adapter, and what they have in common."""

    tensors: dict[str, dict[str, np.ndarray]]
    records: dict[str, dict[str, Any]]
    base: dict[str, dict[str, str]]
    configs: dict[str, Any]
    metadata: dict[str, Any]

    def writer(self, path: str | os.PathLike, index: StackIndex | None) -> Callable[[], None]:
        """Return what writes all; of one adapter without an index, whose name is empty."""
        if index is None:
            header = self._header(VERSION, self.records[""], self.base[""], self.configs[""])
            return lambda: safetensors_file.write(path, self.tensors[""], header)
        if str(path).endswith(SUFFIX):
            base = {p: x for own in self.base.values() for p, x in own.items()}
            header = self._header(STACK_VERSION, self.records, base, self.configs)
            tensors = {
                f"{name}/{tensor}": x
                for name, own in self.tensors.items()
                for tensor, x in own.items()
            }
            header["stack"] = index.to_json()
            return lambda: safetensors_file.write(path, tensors, header)
        files: dict[str, Content] = {INDEX: index.to_json().encode()}
        for name in index.names:
            header = self._header(VERSION, self.records[name], self.base[name], self.configs[name])
            data = safetensors_file.encode(self.tensors[name], header, source=name + SUFFIX)
            files[name + SUFFIX] = data
        return lambda: write_directory(path, files)

    def _header(self, version: int, records: Any, base: Any, config: Any) -> dict[str, str]:
        return {
            "format": FORMAT,
            "version": str(version),
            "layouts": json.dumps(records),
            "base": json.dumps(base),
            "config": json.dumps(config),
            "metadata": json.dumps(self.metadata),
        }


def _check_base(nodes: Mapping[str, Adapted], base: Any) -> None:
    leaves, _ = flatten_with_paths(base)
    fits = lambda p, node: check_fits(p, node, leaves[p], stacked=True)
    problems = [
        line
        for p, node in nodes.items()
        for line in (fits(p, node) if p in leaves else [f"{p}: not in the base"])
    ]
    if problems:
        raise StructureError("save: the adapters do not fit the base:\n" + grouped(problems))


def _entries(base: Any, each: Mapping[str, Mapping[str, Adapted]]) -> dict[str, dict[str, str]]:
    """Return the fingerprint of the base for each adapter, without what that one replaces."""
    whole = {
        name: {p for p, node in own.items() if isinstance(node, TrainedLeaf)}
        for name, own in each.items()
    }
    found = {} if base is None else fingerprint(base, skip=set.intersection(*whole.values()))
    return {name: {p: x for p, x in found.items() if p not in own} for name, own in whole.items()}


def _configs(
    config: LoraConfig | Sequence[LoraConfig | None] | None, index: StackIndex
) -> dict[str, Any]:
    """Return the configuration of each adapter as JSON values."""
    count = len(index.names)
    each = [config] * count if config is None or isinstance(config, LoraConfig) else list(config)
    if len(each) != count:
        raise ConfigError(f"save: {len(each)} configurations for {count} adapters")
    values = [None if one is None else one.to_dict() for one in each]
    return dict(zip(index.names, values, strict=True))


def _refuse_abstract(nodes: Mapping[str, Adapted]) -> None:
    arrays = _arrays(nodes)
    abstract = [name for name, x in arrays.items() if isinstance(x, jax.ShapeDtypeStruct)]
    if abstract:
        raise StructureError(
            "save: these are abstract (ShapeDtypeStruct), without values: " + ", ".join(abstract)
        )


def _arrays(nodes: Mapping[str, Adapted]) -> dict[str, Any]:
    return {
        f"{path}.{field}": getattr(node, field)
        for path, node in nodes.items()
        for field in schema.FIELDS[schema.kind(node)]
    }


def _tensors(name: str, nodes: Mapping[str, Adapted]) -> dict[str, np.ndarray]:
    values: dict[str, np.ndarray] = processes.to_host(_arrays(nodes))
    bad = [tensor for tensor, x in values.items() if not np.isfinite(x).all()]
    if bad:  # `load` would reject them
        of = f" of adapter {name}" if name else ""
        raise StructureError(f"save: NaN or infinite values in {', '.join(bad)}{of}")
    return values
