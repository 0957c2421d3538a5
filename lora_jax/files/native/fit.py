"""Adapters of native files as overlays of a base, which must be the one of their training."""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters.split import base_of
from lora_jax.core.errors import AdapterFileError, BaseKindWarning, warn_user
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.patterns import nearest
from lora_jax.core.sharding.placement import Placement
from lora_jax.core.weights import TrainedLeaf, check_fits, is_adapted
from lora_jax.files.disk import strict_json
from lora_jax.files.disk.fingerprint import differences, fingerprint, recoded, weak_entries
from lora_jax.files.native import schema
from lora_jax.files.native.file import NativeFile

_SUGGESTED = 5  # unknown paths that are shown with the nearest ones, which take time to find


def fit(file: NativeFile, base: Any, fsdp: str | Sequence[str] | None = None) -> Any:
    """Return the adapters of a file as an overlay of `base`; what `load` does after reading."""
    return fit_all([file], base, fsdp)[0]


def fit_all(
    files: Sequence[NativeFile], base: Any, fsdp: str | Sequence[str] | None = None
) -> list[Any]:
    """Return the adapters of each file as an overlay of `base`, whose weights are read once."""
    base = base_of(base)
    leaves, treedef = flatten_with_paths(base, is_leaf=is_adapted)
    placement = Placement.of("load", leaves.values(), fsdp)
    checked = _Checked(base, files)
    overlays = []
    for file in files:
        nodes = _with_todays_names(file.nodes, leaves)
        problems = _problems(file, nodes, leaves) or checked.problems(file, nodes, leaves)
        if problems:
            raise AdapterFileError(
                f"{file.path}: the adapters in this file do not fit this base:\n"
                + strict_json.lines(problems, "weights")
            )
        in_jax = {
            name: placement.place(jax.tree.map(jnp.asarray, node), leaves[name])
            for name, node in nodes.items()
        }
        overlays.append(jax.tree_util.tree_unflatten(treedef, [in_jax.get(x) for x in leaves]))
    return overlays


def _problems(file: NativeFile, nodes: Mapping[str, Any], leaves: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with a file, and with its adapters on these leaves."""
    problems = list(file.problems)
    unknown = [name for name in nodes if name not in leaves]
    problems += _tell_prefix(unknown, leaves) or [
        f"{name}: not in this base"
        + (f"; {nearest(name, leaves)}" if name in unknown[:_SUGGESTED] else "")
        for name in unknown
    ]
    for name, node in nodes.items():
        problems += [f"{name}: {line}" for line in schema.dtype_problems(node)]
        problems += check_fits(name, node, leaves[name]) if name in leaves else []
    return problems


class _Checked:
    """A base and its checksums, of which each kind is computed once for all files."""

    def __init__(self, base: Any, files: Sequence[NativeFile]):
        self._base = base
        whole = [_whole(file.nodes) for file in files]
        self._skip = set.intersection(*whole) if whole else set()
        self._sums: dict[tuple[str, ...], dict[str, str]] = {}

    def problems(
        self, file: NativeFile, nodes: Mapping[str, Any], leaves: Mapping[str, Any]
    ) -> list[str]:
        """Return where the base differs from the one of the training; warn of what is close."""
        if not file.header["base"]:
            return []
        whole = _whole(nodes)
        named = _with_todays_names(file.header["base"], leaves)
        saved = {path: entry for path, entry in named.items() if path not in whole}
        weak = weak_entries(saved)
        found = {p: x for p, x in self._fingerprint(weak).items() if p not in whole}
        problems = differences(saved, found)
        if not problems:
            _tell_recoded(file.path, recoded(saved, found))
        if weak and not problems:
            warn_user(
                f"{file.path}: an older release wrote this file. The base passed its check, the "
                "sum of the weights' bits, which does not see an even number of changed signs; "
                "save the adapters again for the check of every bit"
            )
        return problems

    def _fingerprint(self, weak: Collection[str]) -> dict[str, str]:
        key = tuple(sorted(weak))
        if key not in self._sums:
            self._sums[key] = fingerprint(self._base, skip=self._skip, weak=weak)
        return self._sums[key]


def _whole(nodes: Mapping[str, Any]) -> set[str]:
    """Return the paths of the leaves that adapters replace completely."""
    return {name for name, node in nodes.items() if isinstance(node, TrainedLeaf)}


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
