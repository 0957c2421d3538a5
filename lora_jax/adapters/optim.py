"""What an optimizer updates, and how fast: labels, masks, `freeze`, groups, LoRA+, LoRA-FA."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from lora_jax.adapters.kept_shardings import TRAINED_FIELDS
from lora_jax.adapters.partition import FREEZE, TRAIN, by_label
from lora_jax.core.errors import ConfigError, StructureError, TargetError, grouped
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.patterns import compile_regex, lookup, nearest
from lora_jax.core.slots import is_present, without_slots
from lora_jax.core.tree import require_adapted
from lora_jax.core.weights import LoraWeight, is_adapted


def labels(params: Any) -> Any:
    """Label A, B and fully trained leaves "train" and all other leaves "freeze".

    The result has the structure of `params`, a joined tree or an overlay, as
    `optax.multi_transform` needs it.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> config = lora_jax.LoraConfig(rank=1)
    >>> params = lora_jax.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, config)
    >>> node = labels(params)["kernel"]
    >>> node.w, node.a, node.b, node.scale
    ('freeze', 'train', 'train', 'freeze')
    """

    return map_fields(lambda path, field: TRAIN if field in TRAINED_FIELDS else FREEZE, params)


def map_fields(label: Callable[[str, str], str], params: Any) -> Any:
    """Return `label(path, field)` for the leaves of adapted nodes, and "freeze" for all others."""

    def one(path: str, node: Any) -> Any:
        if not is_adapted(node):
            return jax.tree.map(lambda _: FREEZE, node)  # a quantized weight has several arrays
        fields = [f.name for f in dataclasses.fields(node) if "static" not in f.metadata]
        named = {
            field: jax.tree.map(lambda _, f=field: label(path, f), getattr(node, field))
            for field in fields
        }
        return dataclasses.replace(node, **named)

    nodes, treedef = flatten_with_paths(params, is_leaf=is_adapted)
    return jax.tree_util.tree_unflatten(treedef, [one(path, node) for path, node in nodes.items()])


def mask(params: Any) -> Any:
    """Return a tree of the same structure with True at A, B and fully trained leaves, else False.

    `optax.masked` takes such a tree. Note that it passes through the gradients that it masks out:
    used alone it adds raw gradients to the frozen leaves. `freeze` does not.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> config = lora_jax.LoraConfig(rank=1)
    >>> params = lora_jax.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, config)
    >>> mask(params)["kernel"].a, mask(params)["kernel"].w
    (True, False)
    """
    return jax.tree.map(lambda label: label == TRAIN, labels(params))


def freeze(
    tx: optax.GradientTransformation, params: Any, only: Sequence[str] = TRAINED_FIELDS
) -> optax.GradientTransformationExtraArgs:
    """Apply `tx` to A, B and fully trained leaves; every other leaf gets a zero update.

    Frozen leaves have no optimizer state, and `tx` does not see them when it measures something,
    such as the global norm for clipping. `params` may be a joined tree, or an overlay, in which
    `scale` is a frozen leaf. Apply the updates with `lora_jax.apply_updates`, which does not touch
    frozen leaves. Their update is -0.0, which changes no bit either, except that a CPU may round a
    subnormal number to zero.

    Args:
      tx: any optax gradient transformation. Arguments of `update` beyond the parameters (`value`,
        `grad`, `value_fn`) are passed on.
      params: the tree whose structure the gradients will have.
      only: names of the fields that train, among "a", "b", "magnitude" (DoRA) and "value" (fully
        trained leaves and trained rows). LoRA-FA leaves out "a", see `lora_fa`.

    Raises:
      ConfigError: `only` is empty or names a field that does not train.
      StructureError: nothing in `params` would train.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> config = lora_jax.LoraConfig(rank=1)
    >>> params = lora_jax.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, config)
    >>> tx = freeze(optax.adam(1e-3), params)
    >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    >>> float(abs(updates["kernel"].w).max()), float(abs(updates["kernel"].a).max()) > 0
    (0.0, True)
    """
    unknown = [field for field in only if field not in TRAINED_FIELDS]
    if isinstance(only, str) or unknown or not only:
        raise ConfigError(f"freeze: only must be names among {TRAINED_FIELDS}, got {only!r}")
    require_adapted("freeze", params)
    label = lambda path, field: TRAIN if field in only else FREEZE
    if TRAIN not in jax.tree.leaves(map_fields(label, params)):
        raise StructureError(
            f"freeze: nothing would train, because no adapter has a field named in only={only!r}"
        )
    return by_label({TRAIN: tx}, functools.partial(map_fields, label), params)


def lora_fa(tx: optax.GradientTransformation, params: Any) -> optax.GradientTransformationExtraArgs:
    """Apply `tx` to B and all else that trains, but keep A at its initial value (LoRA-FA).

    LoRA-FA, https://arxiv.org/abs/2308.03303, is `freeze(tx, params, only=("b", "magnitude",
    "value"))`. A has no optimizer state. In a jitted step its gradient is never computed, and the
    inputs that it would need are not kept: the backward pass of a layer keeps `x·A`, not `x`.

    Raises:
      StructureError: nothing in `params` would train.
      TargetError: an A is zero, as it is initially for a weight that is only looked up, and would
        stay zero.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> config = lora_jax.LoraConfig(rank=1)
    >>> params = lora_jax.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, config)
    >>> tx = lora_fa(optax.sgd(1.0), params)
    >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    >>> float(abs(updates["kernel"].a).max()), float(abs(updates["kernel"].b).max())
    (0.0, 1.0)
    """
    stuck = [
        path
        for path, node in require_adapted("lora_fa", params).items()
        if isinstance(node, LoraWeight) and isinstance(node.a, jax.Array) and _is_stuck(node)
    ]
    if stuck:
        raise TargetError(
            f"lora_fa: A is zero and would stay zero, and so would the update: {', '.join(stuck)}. "
            "Weights that are only looked up are initialized like this. Leave them out with "
            "exclude=, train them fully with train=, or train some of their rows with rows="
        )
    return freeze(tx, params, only=[field for field in TRAINED_FIELDS if field != "a"])


def _is_stuck(node: LoraWeight) -> bool:
    """Return whether all of an A, or of one in a stack, is known to be zero, though it is used."""
    zero = ~without_slots(node, lambda one: one.a.any()) & is_present(node)
    return not isinstance(zero, jax.core.Tracer) and bool(zero.any())


def lora_plus(
    learning_rate: Any,
    params: Any,
    ratio: float = 16.0,
    optimizer: Callable[[Any], optax.GradientTransformation] = optax.adamw,
) -> optax.GradientTransformationExtraArgs:
    """Train B with `ratio` times the learning rate of A (LoRA+); frozen leaves get a zero update.

    LoRA+, https://arxiv.org/abs/2402.12354, sets η_B = λ·η_A with λ ≫ 1, because with one rate for
    both, A and B of a wide model do not learn at the same pace. All else that trains has A's rate.
    To clip the global norm of gradients that come through `lora(fn)`, clip first:
    `optax.chain(optax.clip_by_global_norm(1.0), lora_plus(1e-4, params))`.

    Args:
      learning_rate: the learning rate of A, a number or an optax schedule.
      params: the tree whose structure the gradients will have, joined or an overlay.
      ratio: λ, a positive number; the paper uses 16.
      optimizer: makes a transformation from a learning rate. Pass a function to set more, such as
        `lambda rate: optax.adamw(rate, weight_decay=0.1)`.

    Raises:
      ConfigError: `ratio` is not positive.
      StructureError: nothing in `params` would train.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> config = lora_jax.LoraConfig(rank=1)
    >>> params = lora_jax.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, config)
    >>> tx = lora_plus(0.5, params, ratio=4, optimizer=optax.sgd)
    >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    >>> float(updates["kernel"].a[0, 0]), float(updates["kernel"].b[0, 0])
    (-0.5, -2.0)
    """
    if not 0 < ratio < math.inf:
        raise ConfigError(f"lora_plus: ratio must be a positive number, got {ratio!r}")
    require_adapted("lora_plus", params)
    faster = (lambda step: ratio * learning_rate(step)) if callable(learning_rate) else None
    rates = {TRAIN: learning_rate, "b": faster or ratio * learning_rate}

    def label(path: str, field: str) -> str:
        return "b" if field == "b" else TRAIN if field in TRAINED_FIELDS else FREEZE

    transforms = {name: optimizer(rate) for name, rate in rates.items()}
    return by_label(transforms, functools.partial(map_fields, label), params)


def groups(
    transforms: Mapping[str, optax.GradientTransformation],
    params: Any,
    default: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Apply a separate transformation to each group of adapters; frozen leaves get a zero update.

    Args:
      transforms: pattern -> transformation. A pattern is a path suffix, a module name or a regex
        for the whole path, as in `LoraConfig.overrides`: "query" or "query/kernel". A field after
        a dot limits it to that field: `r".*\\.b"` is every B. The path of the leaf itself wins,
        then the first pattern that matches.
      params: the tree whose structure the gradients will have, joined or an overlay.
      default: the transformation for what no pattern matches; with None such a leaf is an error.

    Raises:
      TargetError: a pattern matches nothing that trains, or a leaf has no group and no default.
      StructureError: nothing in `params` would train.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> params = {"up": {"kernel": jnp.ones((4, 3))}, "down": {"kernel": jnp.ones((3, 4))}}
    >>> params = lora_jax.init(jax.random.key(0), params, lora_jax.LoraConfig(rank=1))
    >>> tx = groups({"up": optax.sgd(2.0)}, params, default=optax.sgd(1.0))
    >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    >>> float(updates["up"]["kernel"].b[0, 0]), float(updates["down"]["kernel"].b[0, 0])
    (-2.0, -1.0)
    """
    for key in transforms:
        compile_regex("groups", key)
    names = [
        (path, field)
        for path, node in require_adapted("groups", params).items()
        for field in TRAINED_FIELDS
        if getattr(node, field, None) is not None
    ]
    found = {name: _group(transforms, *name) for name in names}
    paths = dict.fromkeys(path for path, _ in names)
    problems = [
        f"groups: {key!r} matches nothing that trains; {nearest(key, paths)}"
        for key in transforms
        if not any(_group({key: None}, *name) for name in names)
    ]
    problems += [
        f"groups: {path}.{field} has no group; add a pattern for it, or pass default="
        for (path, field), group in found.items()
        if group is None and default is None
    ]
    if problems:
        raise TargetError(grouped(problems, "leaves"))

    def label(path: str, field: str) -> str:
        if (path, field) not in found:
            return FREEZE
        group = found[path, field]
        return TRAIN if group is None else f"group {group}"

    named = {f"group {key}": tx for key, tx in transforms.items()}
    rest = {} if default is None else {TRAIN: default}
    return by_label({**named, **rest}, functools.partial(map_fields, label), params)


def _group(table: Mapping[str, Any], path: str, field: str) -> str | None:
    """Return the key of the group that contains a field of the leaf at `path`, or None."""
    named = f"{path}.{field}"
    exact = [key for key in (named, path, path.rpartition("/")[0]) if key in table]
    keys = (key for key in table if any(lookup({key: 0}, p) for p in (named, path)))
    return exact[0] if exact else next(keys, None)
