"""Write adapters as a trainer keeps them, and as a PEFT adapter."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.core.errors import ConfigError, StructureError, grouped
from lora_jax.core.paths import flatten_with_key_paths, flatten_with_paths, path_str
from lora_jax.core.slots import all_unpadded
from lora_jax.core.tree import adapted_nodes, require_adapted
from lora_jax.core.weights import LoraWeight, TrainedLeaf, is_adapted
from lora_jax.files import peft
from lora_jax.files.disk.processes import to_host
from lora_jax.files.naming import Naming
from lora_jax.files.naming.patterns import fill, match
from lora_jax.files.orbax.factors import from_weight, written_rank
from lora_jax.files.orbax.formats import format_of
from lora_jax.files.orbax.nested import nest
from lora_jax.files.orbax.rows import Format, Row


def to_tree(adapters: Any, format: str, *, alpha: float | None = None) -> Any:
    """Return adapters as a trainer's parameters: its factors beside the weights.

    Args:
      adapters: an overlay, for the factors alone, or a joined tree, for the weights too.
      format: one of `FORMATS`: "openpi", "gemma", "tunix", "maxtext" or "maxtext_qwen".
      alpha: of the trainer, whose scale is alpha over the rank. By default the scale that the
        adapters have: they must agree in it. openpi's is the rank.

    Returns:
      Nested dictionaries of arrays. Scales that the format does not have are multiplied into B.
      openpi has one rank for all attention layers of an expert, and one for its feed-forward
      layers, so lower ranks are padded with zeros; each head gets the same A, unless the adapters
      come from openpi.

    Raises:
      StructureError: the format cannot hold these adapters; all problems are listed.
      ConfigError: the format is unknown.
    """
    layout = format_of(format)
    nodes = all_unpadded(require_adapted("to_tree", adapters))
    rows, problems = {}, []
    for path, node in nodes.items():
        found = _row(path, node, layout)
        if isinstance(found, str):
            problems.append(f"{path}: {found}")
        else:
            rows[path] = found
    if problems:
        raise StructureError(
            f"to_tree: a checkpoint of {layout.title} cannot hold these adapters:\n"
            + grouped(sorted(problems))
        )
    host: dict[str, Any] = {path: to_host(node) for path, node in nodes.items()}
    ranks = _ranks(host, rows)
    leaves: dict[tuple[Any, ...], Any] = {}
    for key_path, leaf in flatten_with_key_paths(adapters, is_adapted):
        keys, path = tuple(_key(key) for key in key_path), path_str(key_path)
        if path not in nodes:
            leaves[keys] = leaf
            continue
        row, node, rank = rows[path], host[path], ranks[path]
        if leaf.w is not None:
            leaves[keys] = leaf.w
        scale = _scale(layout, row, host, alpha, rank)
        where = match(row.weight, path)
        assert where is not None, "the row was chosen by this path"
        for template, x in zip((row.a, row.b), from_weight(row, node, scale, rank), strict=True):
            leaves[_beside(keys, path, fill(template, where))] = x
    return nest(leaves)


def _ranks(nodes: Mapping[str, Any], rows: Mapping[str, Row]) -> dict[str, int]:
    """Return the rank that each weight's factors get: the largest one of its group."""
    own = {path: written_rank(rows[path], node) for path, node in nodes.items()}
    largest: dict[str, int] = {}
    for path, rank in own.items():
        group = rows[path].group
        largest[group] = max(rank, largest.get(group, 0))
    return {path: largest[rows[path].group] if rows[path].group else n for path, n in own.items()}


def _row(path: str, node: Any, layout: Format) -> Row | str:
    """Return the row of a weight, or why it has none."""
    if isinstance(node, TrainedLeaf) or not isinstance(node, LoraWeight):
        return "is trained without factors"
    if node.magnitude is not None:
        return "has DoRA, which these trainers lack; merge it, or make a LoRA of it with extract"
    there = [row for row in layout.rows if match(row.weight, path) is not None]
    for row in there:
        if row.layout == node.layout.axes:
            return row
    if there:
        return f"has the layout {node.layout.axes!r}, not {' or '.join(x.layout for x in there)}"
    return "no row of this format has this path"


def _scale(
    layout: Format, row: Row, nodes: Mapping[str, Any], alpha: float | None, rank: int
) -> float:
    """Return the scale of the format at this rank: of `alpha`, or of most adapters."""
    if layout.scale == "none" or not row.scaled:
        return 1.0
    if alpha is not None:
        return alpha / rank
    if layout.scale == "alpha = rank":
        return 1.0
    first = next(iter(nodes.values()))
    common = float(np.asarray(first.scale).reshape(-1)[0]) * first.a.shape[-1]
    return common / rank if common else 1.0


def _key(key: Any) -> Any:
    """Return the plain key of a JAX key."""
    for field in ("key", "idx", "name"):
        if hasattr(key, field):
            return getattr(key, field)
    raise StructureError(f"to_tree: {key!r} is not a key of a dictionary or list")


def _beside(keys: tuple[Any, ...], path: str, other: str) -> tuple[Any, ...]:
    """Return the keys of a path that shares its beginning with another one's."""
    own, names = path.split("/"), other.split("/")
    same = 0
    while same < min(len(own), len(names), len(keys)) and own[same] == names[same]:
        same += 1
    return (*keys[:same], *names[same:])


def naming(params: Any, format: str) -> Naming:
    """Return Hugging Face's names of the adapted weights of a checkpoint.

    Args:
      params: from `load` or `from_tree`.
      format: its format.

    Raises:
      ConfigError: the format is unknown, is not that of this model, or has no names for one of the
        weights.
    """
    layout = format_of(format)
    others = [path for path in flatten_with_paths(params)[0] if path.endswith(layout.not_of)]
    if others:
        raise ConfigError(
            f"{others[0]}: {layout.title} weights with this leaf have other names and rotations in "
            f'Hugging Face; give the format "{layout.instead}"'
        )
    nodes = adapted_nodes(params)
    layouts = {path: x.layout.axes for path, x in nodes.items() if isinstance(x, LoraWeight)}
    found = layout.naming(layouts)
    named = [template for entry in found.entries for template in entry.paths]
    for path in layouts:
        if all(match(template, path) is None for template in named):
            raise ConfigError(
                f"{path}: {layout.title} weights have no Hugging Face name here; pass a naming to "
                "lora_jax.peft.save"
            )
    return found


def to_peft(directory: str | os.PathLike, params: Any, format: str, **options: Any) -> None:
    """Write a checkpoint's adapters as a PEFT adapter of the model in Hugging Face's layout.

    Args:
      directory: created if missing.
      params: from `load` or `from_tree`.
      format: its format. The names are those of openpi's PyTorch models, of Gemma, of tunix's
        Gemma, Llama and Qwen, and of MaxText's Llama ("maxtext"), whose rotations and queries are
        converted, and Qwen ("maxtext_qwen").
      **options: of `lora_jax.peft.save`.

    Raises:
      ConfigError: the format has no names for one of the weights.
      StructureError, OSError: as `lora_jax.peft.save`.
    """
    converted, names = for_torch(params, format)
    peft.save(directory, converted, names, **options)


def for_torch(params: Any, format: str) -> tuple[Any, Naming]:
    """Return a checkpoint's adapters as those of the PyTorch model, and their names there.

    Args:
      params: from `load` or `from_tree`.
      format: its format. MaxText's queries are divided by the square root of the size of a head,
        so their updates grow by that much.

    Raises:
      ConfigError: as `naming`.
    """
    layout = format_of(format)
    names, grown = naming(params, format), {}
    for path, node in adapted_nodes(params).items():
        if path.endswith(layout.grown_queries) and isinstance(node, LoraWeight):
            size = node.b.shape[-1]
            grown[path] = dataclasses.replace(node, scale=node.scale * np.sqrt(np.float32(size)))
    return (_replaced(params, grown) if grown else params), names


def _replaced(params: Any, nodes: Mapping[str, Any]) -> Any:
    """Return a tree of dictionaries with other nodes at these paths."""
    found = {
        tuple(_key(key) for key in keys): nodes.get(path_str(keys), leaf)
        for keys, leaf in flatten_with_key_paths(params, is_adapted)
    }
    return nest(found)
