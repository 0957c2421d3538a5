"""Several overlays of one base, leaf by leaf."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lora_jax.adapters.algebra.slots import is_stack, out_of_stack
from lora_jax.adapters.split import split
from lora_jax.adapters.stacks.stack import unstack
from lora_jax.core.errors import StructureError
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.patterns import nearest
from lora_jax.core.tree import require_adapted
from lora_jax.core.weights import Adapted, LoraWeight, is_adapted


@dataclasses.dataclass(frozen=True)
class Overlays:
    """Adapters of one base.

    Attributes:
      caller: the verb that takes them, for messages.
      nodes: of each adapter, its nodes by path, without their base.
      leaves: the base by path; None if it is not known.
      template: a tree of which the result has the structure.
    """

    caller: str
    nodes: Sequence[Mapping[str, Adapted]]
    leaves: Mapping[str, Any] | None
    template: Any

    @classmethod
    def of(cls, caller: str, adapters: Any, base: Any) -> "Overlays":
        """Return the overlays that a verb was called with.

        Args:
          caller: the verb.
          adapters: a sequence of overlays or joined trees, or a stack.
          base: the base; by default that of the first joined tree, if there is one.

        Raises:
          StructureError: there are none, or one is not an overlay.
        """
        if not isinstance(adapters, list | tuple) and is_stack(adapters):
            adapters = unstack(adapters)
        if not isinstance(adapters, list | tuple) or not adapters:
            raise StructureError(
                f"{caller}: takes a list of overlays, [adapters, ...], got "
                + (f"a {type(adapters).__name__}" if adapters else "none")
            )
        overlays = []
        for adapter in adapters:
            if any(node.w is not None for node in require_adapted(caller, adapter).values()):
                own, adapter = split(adapter)
                base = own if base is None else base
            if is_stack(adapter):
                raise StructureError(
                    f"{caller}: the list contains a stack; take its adapters out by unstack(stack)"
                )
            overlays.append(out_of_stack(caller, adapter))
        nodes = [_without_keys(require_adapted(caller, overlay)) for overlay in overlays]
        if base is not None:
            leaves, _ = flatten_with_paths(base, is_leaf=is_adapted)
            return cls(caller, nodes, leaves, base)
        every = {path for those in nodes for path in those}
        whole = (tree for tree in overlays if every <= _places(tree).keys())
        template = next(whole, None)
        if template is None:
            raise StructureError(
                f"{caller}: no overlay has a place for all adapted leaves; pass base=, the "
                "parameters or their shapes"
            )
        return cls(caller, nodes, None, template)

    @property
    def paths(self) -> list[str]:
        """The paths of the adapted leaves, in the order of the tree."""
        adapted = {path for nodes in self.nodes for path in nodes}
        order = [path for path in _places(self.template) if path in adapted]
        return order + sorted(adapted - set(order))

    def at(self, path: str) -> tuple[list[int], list[Any]]:
        """Return the numbers of the adapters that have a node at a path, and their nodes."""
        numbers = [i for i, nodes in enumerate(self.nodes) if path in nodes]
        return numbers, [self.nodes[i][path] for i in numbers]

    def base_leaf(self, path: str) -> Any:
        """Return a leaf of the base, or None where its values are not known."""
        leaf = None if self.leaves is None else self.leaves.get(path)
        known = jax.tree.leaves(leaf)
        concrete = not any(isinstance(x, jax.ShapeDtypeStruct) for x in known)
        nodes = jax.tree.leaves(self.at(path)[1])
        return leaf if concrete or any(isinstance(x, jax.ShapeDtypeStruct) for x in nodes) else None

    def problems(self) -> list[str]:
        """Return which nodes have no plain leaf in the base."""
        if self.leaves is None:
            return []
        problems = []
        for path in self.paths:
            if path not in self.leaves:
                problems.append(f"{path}: not in the base; {nearest(path, self.leaves)}")
            elif is_adapted(self.leaves[path]):
                problems.append(
                    f"{path}: the base is adapted itself; pass the base of split(params)"
                )
        return problems

    def rebuild(self, nodes: Mapping[str, Adapted]) -> Any:
        """Return the overlay with these nodes, None everywhere else."""
        places, treedef = flatten_with_paths(self.template, is_leaf=_is_place)
        return jax.tree_util.tree_unflatten(treedef, [nodes.get(path) for path in places])


def _without_keys(nodes: Mapping[str, Adapted]) -> dict[str, Adapted]:
    """Return nodes with dropout off, so that those of several adapters have one structure."""
    return {
        path: dataclasses.replace(node, key=None) if isinstance(node, LoraWeight) else node
        for path, node in nodes.items()
    }


def _places(tree: Any) -> dict[str, Any]:
    return flatten_with_paths(tree, is_leaf=_is_place)[0]


def _is_place(x: Any) -> bool:
    return x is None or is_adapted(x)
