"""Resolve names of modules, PyTorch's or the tree's, to paths of the tree."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lora_jax import TargetError
from lora_jax.core.config import ALL_LINEAR
from lora_jax.core.foreign import shown
from lora_jax.core.paths import flatten_with_paths
from lora_jax.files.naming import Naming

EMBEDDING = "embed_tokens"
HEADS = ("lm_head",)  # "all-linear" leaves the output head alone, as PEFT does

_Names = Mapping[str, Sequence[str]]  # path -> PyTorch's names


def resolve(targets: Sequence[str], params: Any, naming: Naming) -> list[str]:
    """Return the paths of the leaves that `targets` name.

    A target is the end of a PyTorch module's name ("q_proj", "self_attn.q_proj", or all of it), the
    end of a path in the tree or a module there ("query/kernel", "query", "layer_0"), a PyTorch
    module that contains others ("self_attn"), or "all-linear": every linear layer except the output
    head.

    Args:
      targets: at least one.
      params: the tree, arrays or `ShapeDtypeStruct`s.
      naming: of the tree's leaves.

    Raises:
      TargetError: targets that match nothing, each with the most similar names.
    """
    modules = _modules(params, naming)
    places = naming.places(_shapes(params)).items()
    linear = [
        path
        for path, place in places
        if place.entry.kind not in ("", "embedding") and modules[path][0] not in HEADS
    ]
    if not targets:
        raise TargetError("--targets: is empty; name modules, or all-linear")
    return _find("--targets", targets, modules, {ALL_LINEAR: linear})


def without(targets: Sequence[str], excluded: Sequence[str], params: Any, naming: Naming) -> Any:
    """Return the target paths without those that `excluded` names.

    Raises:
      TargetError: a name matches no module or none of the targets, or no target is left.
    """
    modules = {path: names for path, names in _modules(params, naming).items() if path in targets}
    left_out = _find("--exclude", excluded, modules, {})
    kept = [path for path in targets if path not in left_out]
    if not kept:
        raise TargetError("--exclude: leaves no module of --targets to adapt; exclude fewer")
    return kept


def resolve_leaves(trained: Sequence[str], params: Any, naming: Naming) -> list[str]:
    """Return the paths of the leaves that `--train` names: weights, biases, norms, whole modules.

    Raises:
      TargetError: names that match nothing, each with the most similar names.
    """
    leaves = {
        path: [name for _, names in place.layers() for full in names for name in _ends(full)]
        for path, place in naming.places(_shapes(params)).items()
    }
    return _find("--train", trained, leaves, {})


def _ends(tensor: str) -> tuple[str, str]:
    """Return a tensor's name, and that of its module."""
    return tensor, tensor.rpartition(".")[0]


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    leaves, _ = flatten_with_paths(params)
    return {path: x.shape for path, x in leaves.items()}


def _modules(params: Any, naming: Naming) -> dict[str, list[str]]:
    """Return the names of the modules that can be adapted, by path."""
    return {
        path: [name.removesuffix(".weight") for _, names in place.layers() for name in names]
        for path, place in naming.places(_shapes(params)).items()
        if place.entry.kind
    }


def _find(
    option: str, wanted: Sequence[str], modules: _Names, groups: Mapping[str, Collection[str]]
) -> list[str]:
    found: dict[str, None] = {}
    problems = []
    for name in wanted:
        paths = groups[name] if name in groups else _match(name, modules)
        if not paths:
            problems.append(_unknown(option, name, modules, groups))
        found |= dict.fromkeys(paths)
    if problems:
        raise TargetError("\n".join(problems))
    return list(found)


def _match(target: str, modules: _Names) -> list[str]:
    in_torch = lambda path: any(f".{name}".endswith(f".{target}") for name in modules[path])
    in_tree = lambda path: f"/{path}".endswith(f"/{target}") or f"/{target}/" in f"/{path}/"
    above = lambda path: any(f".{target}." in f".{name}." for name in modules[path])
    tests = (in_torch, in_tree, above)  # the first that matches anything decides
    return next(filter(None, ([path for path in modules if test(path)] for test in tests)), [])


def _unknown(option: str, target: str, modules: _Names, groups: Collection[str]) -> str:
    last = {name.removesuffix(".weight").rpartition(".")[2] for n in modules.values() for name in n}
    known = sorted(last - {"bias"})
    close = difflib.get_close_matches(target.rpartition(".")[2], known, n=3, cutoff=0.3) or known
    choices = ", ".join([*close, *groups])
    if target in HEADS and EMBEDDING in known:
        choices = f"{EMBEDDING}, which is the head too in this model"
    return f"{option}: no module is called {shown(target)!r}; choose from {choices}"
