"""Which leaves the `targets` and `exclude` of a verb select."""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from lora_jax.core.config import ALL_LINEAR
from lora_jax.core.dtypes import is_floating
from lora_jax.core.errors import LeftOutWarning, TargetError, grouped, warn_user
from lora_jax.core.patterns import Pattern, names_leaf, names_module, select
from lora_jax.engine import layout_inference
from lora_jax.engine.left_out import matrices_left_out
from lora_jax.engine.uses import Uses

_ADVICE = (
    "Name it in targets= to adapt it, in train= to train all of it, or in exclude= to leave it out "
    "without this warning"
)


def select_targets(
    targets: Pattern,
    exclude: Pattern,
    leaves: Mapping[str, Any],
    uses: Uses,
    taken: Mapping[str, str] = MappingProxyType({}),
    advice: str = _ADVICE,
) -> dict[str, str]:
    """Return the paths that `targets` selects, each with the entry that selected it.

    Args:
      targets: "all-linear" or a pattern, as in `LoraConfig`.
      exclude: what to leave out of them.
      leaves: every leaf by path.
      uses: what the function does with each, None without a function.
      taken: the paths that train in another way, with the name of the field that says so.
      advice: what to do about a matrix that "all-linear" leaves out, for the warning.

    Raises:
      TargetError: an entry selects nothing, or "all-linear" finds nothing.
    """
    excluded = select("exclude", exclude, leaves)
    if isinstance(targets, str) and targets == ALL_LINEAR:
        found = {p: ALL_LINEAR for p, leaf in leaves.items() if _is_linear(p, leaf, uses)}
        unwanted = {*excluded, *taken}
        others = {p: x for p, x in leaves.items() if p not in unwanted}
        _report_left_out(others, uses, not found, advice)
        return {p: e for p, e in found.items() if p not in unwanted}
    found = _expand_modules(select("targets", targets, leaves), leaves, uses)
    for field in ("train", "rows"):
        trained = [path for path in taken if taken[path] == field]
        check_once(found, trained, f"in targets and in {field}")
    return {path: entry for path, entry in found.items() if path not in excluded}


def _report_left_out(leaves: Mapping[str, Any], uses: Uses, is_empty: bool, advice: str) -> None:
    """Warn of the matrices that "all-linear" leaves out although the function uses them.

    Raises:
      TargetError: it finds nothing to adapt; the reasons are in the message.
    """
    if uses is None:
        if is_empty:
            raise TargetError(
                "targets: without the function all-linear selects kernels by their shape and name, "
                "and no leaf is one. Pass the function and its arguments, or name the targets"
            )
        return
    found = matrices_left_out(leaves, uses)
    reasons = {path: reason for path, (reason, is_surprise) in found.items() if is_surprise}
    shown = [f"{path}: {reason}" for path, reason in (reasons or _reasons(found)).items()]
    if is_empty:
        head = (
            "targets: all-linear finds no weight that meets an activation as it is"
            if reasons
            else "targets: no leaf is contracted with an activation"
        )
        raise TargetError("\n".join([head, *([grouped(shown)] if shown else [])]))
    if reasons:
        some = f"{len(reasons)} matrices" if len(reasons) > 1 else "a matrix"
        more = f"; and {len(shown) - 3} more" if len(shown) > 3 else ""
        warn_user(
            f"targets: all-linear leaves out {some} that the function uses ({'; '.join(shown[:3])}"
            f"{more}). {advice}; summary(params, fn, ...) lists all",
            LeftOutWarning,
        )


def _reasons(found: Mapping[str, tuple[str, bool]]) -> dict[str, str]:
    return {path: reason for path, (reason, _) in found.items()}


def _expand_modules(
    found: Mapping[str, str], leaves: Mapping[str, Any], uses: Uses
) -> dict[str, str]:
    """Return the selected paths, where an entry that names a module stands for its linear weights.

    Raises:
      TargetError: an entry names a module without linear weights.
    """
    others = {
        path: entry
        for path, entry in found.items()
        if names_module(entry, path)
        and not names_leaf(entry, path)
        and not _is_linear(path, leaves[path], uses)
    }
    kept = {path: entry for path, entry in found.items() if path not in others}
    modules = dict.fromkeys(others.values())
    empty = [e for e in modules if not any(names_module(e, path) for path in kept)]
    if empty:
        raise TargetError(
            "\n".join(f"targets: {e!r} names a module without linear weights" for e in empty)
        )
    return kept


def _is_linear(path: str, leaf: Any, uses: Uses) -> bool:
    if not is_floating(leaf):
        return False
    if uses is not None:
        return layout_inference.is_linear(uses.get(path, ()))
    return path.split("/")[-1] != "embedding" and len(leaf.shape) > 1


def check_once(some: Collection[str], others: Collection[str], where: str) -> None:
    """Raise if two selections have a path in common."""
    both = sorted({*some} & {*others})
    if both:
        raise TargetError(f"{', '.join(both)}: {where}; choose one")


def check_floating(chosen: Collection[str], leaves: Mapping[str, Any], done: str) -> None:
    """Raise unless the leaves at these paths are floating, so that they can be `done`."""
    wrong = [
        f"{path}: {getattr(leaves[path], 'dtype', type(leaves[path]).__name__)} cannot be {done}; "
        "only floating arrays can. Leave it out with exclude="
        for path in chosen
        if not is_floating(leaves[path])
    ]
    if wrong:
        raise TargetError(grouped(wrong, "leaves"))
