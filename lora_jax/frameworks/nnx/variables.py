"""The NNX variables of an adapted model: what trains, and what is frozen."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from lora_jax.adapters.kept_shardings import TRAINED_FIELDS
from lora_jax.core.weights import Adapted as Node


class Trained(nnx.Param):
    """An array that trains: A, B, a magnitude, or the value of a fully trained leaf or of rows."""


class Frozen(nnx.Variable):
    """What does not train: a parameter of the base or a scale. It is not an `nnx.Param`."""


def frozen(model: nnx.Module) -> nnx.Module:
    """Return a model with a `Frozen` for each `nnx.Param`; other variables are the same."""

    def one(_: Any, variable: Any) -> Any:
        if not isinstance(variable, nnx.Param):
            return variable
        metadata = {**variable.get_metadata(), "original": type(variable)}
        return Frozen.from_metadata(variable.get_raw_value(), metadata)

    return nnx.map(one, model, recreate_variables=False)


def thawed(model: nnx.Module) -> nnx.Module:
    """Return what `frozen` was given, with new parameters; other variables are the same."""

    def one(_: Any, variable: Any) -> Any:
        if not isinstance(variable, Frozen):
            return variable
        metadata = variable.get_metadata()
        original = metadata.pop("original")
        return original.from_metadata(variable.get_raw_value(), metadata)

    return nnx.map(one, model, recreate_variables=False)


class Factors(nnx.Module):
    """The arrays of one adapted weight as variables, named as its fields: `a`, `b`, `scale`, ...

    Attributes:
      path: the path of the weight in the model, "layers/0/kernel".
      kind: the weight without its arrays.
    """

    def __init__(self, path: str, node: Node) -> None:
        self.path = path
        names = [f.name for f in dataclasses.fields(node) if "static" not in f.metadata]
        nothing: dict[str, Any] = dict.fromkeys(names)
        self.kind = nnx.static(dataclasses.replace(node, **nothing))
        for name in names:
            if (value := getattr(node, name)) is not None:
                setattr(self, name, Trained(value) if name in TRAINED_FIELDS else Frozen(value))

    def variables(self) -> dict[str, nnx.Variable]:
        """Return the variables by the name of the field."""
        return {name: x for name, x in vars(self).items() if isinstance(x, nnx.Variable)}

    def node(self) -> Node:
        """Return the adapted weight with its arrays and without its base."""
        values = {name: variable.get_value() for name, variable in self.variables().items()}
        return dataclasses.replace(self.kind, **values)


def tree_of_factors(nodes: Mapping[str, Node]) -> nnx.Dict:
    """Return the factors of weights without their bases, nested as their paths are."""
    tree: dict[str, Any] = {}
    for path, node in nodes.items():
        *parents, name = path.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = Factors(path, node)
    make: Callable[[Any], Any] = lambda x: (
        nnx.Dict({key: make(value) for key, value in x.items()}) if isinstance(x, dict) else x
    )
    return make(tree)


def factors_in(tree: Any) -> Iterator[Factors]:
    """Iterate over all factors of a tree, in the order of `nnx.state`."""
    found = [node for _, node in nnx.iter_graph(tree) if isinstance(node, Factors)]
    return iter(sorted(found, key=lambda factors: tuple(factors.path.split("/"))))


def nodes_in(tree: Any) -> dict[str, Node]:
    """Return the adapted weights without their bases by path."""
    return {factors.path: factors.node() for factors in factors_in(tree)}


def is_same_array(x: Any, y: Any) -> bool:
    """Return whether two values of variables hold the very same arrays."""
    structures: list[Any] = [jax.tree.structure(value) for value in (x, y)]
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=False)
    return structures[0] == structures[1] and all(a is b for a, b in pairs)
