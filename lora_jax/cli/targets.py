"""Resolve names of modules, PyTorch's or the tree's, to paths of the tree."""

import difflib
from collections.abc import Sequence
from typing import Any

import jax

from lora_jax import TargetError
from lora_jax.core.config import ALL_LINEAR
from lora_jax.files.naming import Naming

HEADS = ("lm_head",)  # "all-linear" leaves the output head alone, as PEFT does


def resolve(targets: Sequence[str], params: Any, naming: Naming) -> list[str]:
    """Return the paths of the leaves that `targets` name.

    A target is the end of a PyTorch module's name ("q_proj", "self_attn.q_proj", or all of it), the
    end of a path in the tree or a module there ("query/kernel", "query", "layer_0"), or
    "all-linear": every linear layer except the output head.

    Args:
      targets: at least one.
      params: the tree, arrays or `ShapeDtypeStruct`s.
      naming: of the tree's leaves.

    Raises:
      TargetError: targets that match nothing, each with the most similar names.
    """
    flat = jax.tree_util.tree_leaves_with_path(params)
    shapes = {jax.tree_util.keystr(p, simple=True, separator="/"): x.shape for p, x in flat}
    modules = {
        path: [name.removesuffix(".weight") for _, names in place.layers() for name in names]
        for path, place in naming.places(shapes).items()
        if place.entry.kind
    }
    linear = [
        path
        for path, place in naming.places(shapes).items()
        if place.entry.kind not in ("", "embedding") and modules[path][0] not in HEADS
    ]
    found: dict[str, None] = {}
    problems = []
    for target in targets:
        paths = linear if target == ALL_LINEAR else _match(target, modules)
        if not paths:
            problems.append(_unknown(target, modules))
        found |= dict.fromkeys(paths)
    if problems:
        raise TargetError("\n".join(problems))
    return list(found)


def _match(target: str, modules: dict[str, list[str]]) -> list[str]:
    in_torch = lambda path: any(f".{name}".endswith(f".{target}") for name in modules[path])
    in_tree = lambda path: f"/{path}".endswith(f"/{target}") or f"/{target}/" in f"/{path}/"
    return [path for path in modules if in_torch(path)] or [p for p in modules if in_tree(p)]


def _unknown(target: str, modules: dict[str, list[str]]) -> str:
    known = sorted({name.rpartition(".")[2] for names in modules.values() for name in names})
    close = difflib.get_close_matches(target.rpartition(".")[2], known, n=3, cutoff=0.3) or known
    return f"--targets: no module is called {target!r}; choose from {', '.join(close)}, all-linear"
