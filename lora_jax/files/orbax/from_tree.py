"""Read the factors in a checkpoint's tree as adapters beside their weights."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.split import base_of
from lora_jax.core.checks import is_number
from lora_jax.core.errors import AdapterFileError, ConfigError, grouped
from lora_jax.core.foreign import shown, shown_value
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.weights import LoraWeight
from lora_jax.files.naming.patterns import fill, match
from lora_jax.files.orbax.factors import Fit, fits, to_weight
from lora_jax.files.orbax.formats import format_of
from lora_jax.files.orbax.nested import leaves_of, nest, path_of, unwrap
from lora_jax.files.orbax.rows import RANK, Format

_FACTOR = re.compile(r"(^|[/_.])lora", re.IGNORECASE)  # in the paths of all factors
_GROWTH, _FREE = 64, 1 << 20  # an adapter has at most so many times the numbers of its factors


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How a format scales updates; the fields are the arguments of `from_tree`."""

    alpha: float | None
    rslora: bool

    def of(self, kind: str, rank: int) -> float:
        """Return the scale of a factor of this rank."""
        if kind == "none":
            return 1.0
        alpha = rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def check(self, layout: Format) -> None:
        """Raise if the format needs an alpha, or has none.

        Raises:
          ConfigError: so it is, or alpha is not a number.
        """
        if self.alpha is not None and not is_number(self.alpha):
            raise ConfigError(f"alpha must be a number, got {shown_value(self.alpha)}")
        if layout.scale == "alpha" and self.alpha is None:
            raise ConfigError(
                f"{layout.title} checkpoints do not hold alpha: pass the alpha= of the training"
            )
        if layout.scale == "none" and (self.alpha is not None or self.rslora):
            raise ConfigError(f"{layout.title} has no scale: leave out alpha and rslora")


def from_tree(
    tree: Any,
    format: str,
    *,
    base: Any = None,
    alpha: float | None = None,
    rslora: bool = False,
    source: str = "the tree",
) -> Any:
    """Return a checkpoint's parameters with its LoRA factors as adapters beside their weights.

    The update is exactly the trainer's. Where a trainer keeps one A for each head (openpi's q, k
    and v), the adapter's rank is the number of heads times the trainer's, and B is diagonal in it.

    Args:
      tree: nested dictionaries of arrays, as Orbax restores them, or an `nnx.State`; the parameters
        may stand in `params`, and leaves in `value`.
      format: one of `FORMATS`: "openpi", "gemma" (`gm.nn.LoRA`), "tunix" (qwix), "maxtext",
        "maxtext_qwen", which differ only in the names in Hugging Face.
      base: the parameters without factors, for a tree that has factors alone.
      alpha: of the training: the scale is alpha over the rank. openpi's default is the rank, gemma
        has none.
      rslora: whether the scale is alpha over the square root of the rank, an option of openpi.
      source: what messages begin with.

    Returns:
      The parameters as nested dictionaries, or `base`, with a `LoraWeight` in the place of each
      adapted weight: what `lora_jax.merge`, `split` and `lora` take.

    Raises:
      AdapterFileError: the tree has no factors, or some that do not fit; all are listed.
      ConfigError: the format is unknown, or alpha is missing or superfluous.

    >>> w, a, b = np.ones((4, 3), "f4"), np.ones((4, 2), "f4"), np.ones((2, 3), "f4")
    >>> tree = {"up": {"kernel": w, "kernel_lora_a": a, "kernel_lora_b": b}}
    >>> params = from_tree(tree, "tunix", alpha=4)
    >>> params["up"]["kernel"].a.shape, float(params["up"]["kernel"].scale)
    ((4, 2), 2.0)
    """
    layout, scaling = format_of(format), Scaling(alpha, rslora)
    scaling.check(layout)
    leaves = {path_of(keys): (keys, x) for keys, x in leaves_of(unwrap(tree))}
    factors = {path: x for path, (_, x) in leaves.items() if _FACTOR.search(path)}
    others = {keys: x for path, (keys, x) in leaves.items() if path not in factors}
    if base is None:
        weights = {path_of(keys): x for keys, x in others.items()}
    else:
        weights, treedef = flatten_with_paths(base_of(base))
    nodes, problems = _nodes(factors, weights, layout, scaling)
    if problems or not nodes:
        lines = grouped(sorted(problems), "leaves") or (
            "it has no LoRA factors: no leaf has 'lora' in its path"
        )
        raise AdapterFileError(f"{source}: not a checkpoint of {layout.title} adapters:\n{lines}")
    joined = {path: dataclasses.replace(node, w=weights[path]) for path, node in nodes.items()}
    if base is not None:
        return treedef.unflatten([joined.get(path, x) for path, x in weights.items()])
    return nest({keys: joined.get(path_of(keys), x) for keys, x in others.items()})


def _nodes(
    factors: Mapping[str, Any], weights: Mapping[str, Any], layout: Format, scaling: Scaling
) -> tuple[dict[str, LoraWeight], list[str]]:
    """Return the adapters by their weights' paths, and what is wrong with the rest."""
    nodes: dict[str, LoraWeight] = {}
    problems, used = [], set[str]()
    for path, a in factors.items():
        found: list[tuple[str, Fit, Any]] = []
        reasons: dict[str, None] = {}
        for row in layout.rows:
            names = match(row.a, path)
            if names is None:
                continue
            weight, other = fill(row.weight, names), fill(row.b, names)
            used |= {path, other}
            if other not in factors:
                reasons[f"{path}: has no {shown(other)} beside it"] = None
            elif weight not in weights:
                reasons[f"{path}: its weight {shown(weight)} is not there; pass base="] = None
            else:
                arrays = weights[weight], a, factors[other]
                problem = _array_problem(path, *arrays)
                reasons[problem or _misfit(path, *arrays)] = None
                shapes = [tuple(x.shape) for x in arrays] if problem is None else []
                found += [(weight, fit, arrays[2]) for fit in fits(row, *shapes)] if shapes else []
        if not found:
            problems += list(reasons)
            continue
        ways = {f"{fit.row.axes}, {' '.join(fit.a)} and {' '.join(fit.b)}" for _, fit, _ in found}
        if len(ways) > 1:
            problems.append(
                f"{path}: sizes that are equal leave open which axes the weight, A and B have: "
                f"{' or '.join(sorted(ways))}"
            )
            continue
        weight, fit, b = found[0]
        node = _node(fit, a, b, scaling.of(_kind(layout, fit), fit.sizes[RANK]))
        if isinstance(node, str):
            problems.append(f"{path}: {node}")
        else:
            nodes[weight] = node
    problems += [f"{path}: {_alone(path, layout)}" for path in factors if path not in used]
    return nodes, problems


def _alone(path: str, layout: Format) -> str:
    """Return why a factor that belongs to no A has no place."""
    for row in layout.rows:
        names = match(row.b, path)
        if names is not None:
            return f"has no {shown(fill(row.a, names))} beside it"
    return "not a factor of this format"


def _kind(layout: Format, fit: Fit) -> str:
    return layout.scale if fit.row.scaled else "none"


def _array_problem(path: str, weight: Any, a: Any, b: Any) -> str | None:
    """Return why a weight or factor is not an array of floating numbers, or None."""
    for name, x in (("the weight", weight), ("A", a), ("B", b)):
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            return f"{path}: {name} is {shown_value(x)}, not an array; dequantize quantized weights"
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return f"{path}: {name} is {x.dtype}, but only floating numbers can be adapted"
    return None


def _misfit(path: str, weight: Any, a: Any, b: Any) -> str:
    shapes = ", ".join(str(tuple(x.shape)) for x in (weight, a, b))
    return f"{path}: the shapes of the weight, A and B do not fit each other: {shapes}"


def _node(fit: Fit, a: Any, b: Any, scale: float) -> LoraWeight | str:
    """Return an adapter, or why its numbers make none."""
    a, b = np.asarray(a), np.asarray(b)
    own = math.prod(fit.sizes[x] for x in fit.row.outputs if x in fit.a)
    if own * (a.size + own * b.size) > max(_GROWTH * (a.size + b.size), _FREE):
        return f"{own} pairs of factors, one for each head, are too many for one adapter"
    if not all(np.isfinite(x.astype(np.float32)).all() for x in (a, b)):
        return "contains NaN or infinite values"
    node = to_weight(fit, a, b, scale)
    return dataclasses.replace(
        node, a=jnp.asarray(node.a), b=jnp.asarray(node.b), scale=jnp.asarray(node.scale)
    )
