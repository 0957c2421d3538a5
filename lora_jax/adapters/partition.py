"""One optax transformation for each label of a tree's leaves, and none for the frozen ones."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax.adapters.kept_shardings import (
    keep_shardings,
    place_state,
    shardings_of_trained,
)
from lora_jax.adapters.opened import close_nodes, open_nodes
from lora_jax.core.dtypes import is_floating
from lora_jax.core.tree import adapted_nodes

TRAIN, FREEZE = "train", "freeze"


def by_label(
    transforms: Mapping[str, optax.GradientTransformation],
    label: Callable[[Any], Any],
    params: Any,
) -> optax.GradientTransformationExtraArgs:
    """Apply each transformation to the leaves with its label; "freeze" gets an update of -0.0.

    The transformations, and their state, see adapted nodes as dictionaries, see `open_nodes`.
    Gradients and state are sharded as the arrays that train in `params` are, on a mesh.
    Arguments beyond the parameters are passed on: trees like the gradients with the same leaves
    left out, and functions of the parameters so that they get whole trees.

    Args:
      transforms: label -> transformation.
      label: the labels of a tree with adapted nodes. It is called on the tree that comes, because
        that may be of another class: `nnx.Optimizer` passes the state of a model.
      params: a tree to take the labels of where what comes has no adapted nodes, such as the
        placeholder of `optax.tree_map_params`.
    """
    own, shardings = label(params), shardings_of_trained(params)
    transforms = {**transforms, FREEZE: _unchanged()}

    def partition(tree: Any) -> optax.GradientTransformationExtraArgs:
        labels = _opened_labels(label(tree), tree) if adapted_nodes(tree) else open_nodes(own)
        return optax.partition(transforms, lambda _: labels, mask_compatible_extra_args=True)

    def init(params: Any) -> Any:
        return place_state(partition(params).init(open_nodes(params)), shardings)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        like: Any = jax.tree.structure(updates)
        updates = _with_integers(updates, params)
        for name, value in extra.items():
            if jax.tree.structure(value) == like:
                extra[name] = open_nodes(_with_integers(value, params))
            elif callable(value):
                extra[name] = _on_whole(value, params)
        opened = None if params is None else open_nodes(params)
        gradients = keep_shardings(open_nodes(updates), shardings)
        new, state = partition(updates).update(gradients, state, opened, **extra)
        return close_nodes(new, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _opened_labels(labels: Any, tree: Any) -> Any:
    """Return the labels of a tree with its nodes opened, in boxes like those of its arrays."""
    leaves, treedef = jax.tree.leaves(open_nodes(labels)), jax.tree.structure(open_nodes(tree))
    return jax.tree.unflatten(treedef, leaves)


def _with_integers(gradients: Any, params: Any) -> Any:
    """Return gradients with those of integers, for which Equinox has None, as JAX has them."""
    if params is None or len(jax.tree.leaves(gradients)) == len(jax.tree.leaves(params)):
        return gradients
    nothing = lambda x: np.zeros(x.shape, jax.dtypes.float0)
    fill = lambda g, x: jax.tree.map(nothing, x) if g is None else g
    return jax.tree.map(fill, gradients, params, is_leaf=lambda g: g is None)


def _unchanged() -> optax.GradientTransformation:
    """Return a transformation to updates that change nothing: x + (-0.0) is x, also for -0.0.

    The gradient of integers, such as the codes of a quantized weight, has a dtype without numbers
    (`jax.dtypes.float0`); their update is zeros of the parameter's dtype, if that is given.
    """

    def zero(x: Any, param: Any = None) -> Any:
        like = param if x.dtype == jax.dtypes.float0 and param is not None else x
        return jnp.full_like(like, -0.0) if is_floating(like) else jnp.zeros_like(like)

    def update(updates: Any, params: Any) -> Any:
        return jax.tree.map(zero, updates, *([] if params is None else [params]))

    return optax.stateless(update)


def _on_whole(fn: Callable[..., Any], params: Any) -> Callable[..., Any]:
    """Return `fn` for trees with opened nodes that lack leaves of `params`, which are put in."""

    @functools.wraps(fn)  # optax reads the names of its arguments
    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*(with_frozen(x, params) for x in args), **kwargs)

    return call


def with_frozen(trained: Any, params: Any) -> Any:
    """Return `params` with the leaves of an opened tree that lacks those that do not train."""
    if not any(map(is_masked, jax.tree.leaves(trained, is_leaf=is_masked))):
        return trained
    pick = lambda x, p: p if is_masked(x) else x
    return close_nodes(jax.tree.map(pick, trained, open_nodes(params), is_leaf=is_masked), params)


def only_trained(params: Any, like: Any) -> Any:
    """Return `params` with opened nodes, without the leaves that `like` lacks."""
    pick = lambda x, p: x if is_masked(x) else p
    return jax.tree.map(pick, like, open_nodes(params), is_leaf=is_masked)


def is_masked(x: Any) -> bool:
    """Return whether optax left a leaf out here."""
    return isinstance(x, optax.MaskedNode)
