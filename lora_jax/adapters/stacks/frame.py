"""`Frame`: the shape that adapters of one weight are brought to, so that they can be stacked."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.layout import Layout
from lora_jax.core.slots import new_slot
from lora_jax.core.weights import Adapted, LoraWeight, TrainedLeaf, TrainedRows


class Frame(abc.ABC):
    """What the adapters of one weight have in common in a stack."""

    @abc.abstractmethod
    def misfit(self, node: Adapted) -> str | None:
        """Return why an adapter has no place in this frame, None if it has."""

    @abc.abstractmethod
    def fill(self, node: Adapted | None) -> Adapted:
        """Return an adapter padded to this frame; None gives one without an effect."""


def frame_of(nodes: Sequence[Adapted], rank: int | None = None) -> Frame:
    """Return the smallest frame in which adapters of one weight fit, single ones or stacks.

    `rank` is a larger one for the factors.
    """
    if isinstance(nodes[0], LoraWeight):
        return LoraFrame.of([x for x in nodes if isinstance(x, LoraWeight)], rank)
    if isinstance(nodes[0], TrainedRows):
        return RowsFrame.of(nodes[0])
    return LeafFrame(_abstract(nodes[0].value, nodes[0].slots), nodes[0].scale.dtype)


@dataclasses.dataclass(frozen=True)
class LoraFrame(Frame):
    """The frame of factors: their shapes without slots, and what the adapters may have."""

    a: jax.ShapeDtypeStruct
    b: jax.ShapeDtypeStruct
    scale: jax.ShapeDtypeStruct
    magnitude: jax.ShapeDtypeStruct | None
    layout: Layout
    dropout: float  # the highest rate

    @classmethod
    def of(cls, nodes: Sequence[LoraWeight], rank: int | None = None) -> "LoraFrame":
        """Return the frame that fits all of these."""
        first = nodes[0]
        rank = max([rank or 0, *(node.rank for node in nodes)])
        batch = len(first.layout.positions("b"))

        def common(field: str) -> jax.ShapeDtypeStruct:
            arrays = [x for node in nodes if (x := getattr(node, field)) is not None]
            shape = _abstract(arrays[0], first.slots).shape
            return jax.ShapeDtypeStruct(shape, jnp.result_type(*(x.dtype for x in arrays)))

        a, b, scale = map(common, ("a", "b", "scale"))
        has_magnitude = any(node.magnitude is not None for node in nodes)
        magnitude = next((x for x in nodes if x.magnitude is not None), first)
        return cls(
            jax.ShapeDtypeStruct((*a.shape[:-1], rank), a.dtype),
            jax.ShapeDtypeStruct((*b.shape[:batch], rank, *b.shape[batch + 1 :]), b.dtype),
            scale,
            _abstract(magnitude.magnitude, magnitude.slots) if has_magnitude else None,
            first.layout,
            max(node.dropout for node in nodes),
        )

    def misfit(self, node: Adapted) -> str | None:
        """Return why an adapter has no place in this frame, None if it has."""
        if not isinstance(node, LoraWeight):
            return f"a {type(node).__name__} does not fit a stack of LoraWeights"
        if node.layout != self.layout:
            return f"layout {node.layout.axes!r} does not fit {self.layout.axes!r}"
        shape = node.shape
        ours = LoraWeight(None, self.a, self.b, self.scale, layout=self.layout).shape
        if shape != ours:
            return f"a weight {shape} does not fit a stack for weights {ours}"
        if node.rank > self.a.shape[-1]:
            return f"rank {node.rank} does not fit a stack of rank {self.a.shape[-1]}"
        if node.magnitude is not None and self.magnitude is None:
            return "the adapter has a magnitude (DoRA), and no adapter of the stack has one"
        if node.dropout and not self.dropout:
            return f"dropout {node.dropout:g} does not fit a stack without dropout"
        return None

    def fill(self, node: Adapted | None) -> LoraWeight:
        """Return factors padded with zeros, whose gradients are zero too, and what is its own."""
        if node is None:
            return LoraWeight(
                None,
                _zeros(self.a),
                _zeros(self.b),
                _zeros(self.scale),
                _zeros(self.magnitude),
                slot=new_slot(0, 0, False),
                layout=self.layout,
                dropout=self.dropout,
            )
        assert isinstance(node, LoraWeight)
        slot = node.slot
        if slot is None:
            slot = new_slot(node.rank, node.dropout, node.magnitude is not None)
        return LoraWeight(
            None,
            _padded(node.a, self.a),
            _padded(node.b, self.b),
            node.scale.astype(self.scale.dtype),
            _zeros(self.magnitude) if node.magnitude is None else node.magnitude,
            slot=slot,
            layout=self.layout,
            dropout=self.dropout,
        )


@dataclasses.dataclass(frozen=True)
class LeafFrame(Frame):
    """The frame of fully trained leaves: all have one shape."""

    value: jax.ShapeDtypeStruct
    scale_dtype: Any

    def misfit(self, node: Adapted) -> str | None:
        """Return why a leaf has no place in this frame, None if it has."""
        if not isinstance(node, TrainedLeaf):
            return f"a {type(node).__name__} does not fit a stack of fully trained leaves"
        same = node.value.shape == self.value.shape
        return None if same else f"a leaf {node.value.shape} does not fit {self.value.shape}"

    def fill(self, node: Adapted | None) -> TrainedLeaf:
        """Return the leaf; None gives one that is switched off."""
        if node is None:
            return TrainedLeaf(None, _zeros(self.value), jnp.zeros((), self.scale_dtype))
        assert isinstance(node, TrainedLeaf)
        return node


@dataclasses.dataclass(frozen=True)
class RowsFrame(Frame):
    """The frame of trained rows: all adapters train the same ones."""

    value: jax.ShapeDtypeStruct
    like: TrainedRows

    @classmethod
    def of(cls, node: TrainedRows) -> "RowsFrame":
        """Return the frame of rows like these."""
        like = dataclasses.replace(node, w=None, value=None, scale=None)
        return cls(_abstract(node.value, node.slots), like)

    def misfit(self, node: Adapted) -> str | None:
        """Return why rows have no place in this frame, None if they have."""
        if not isinstance(node, TrainedRows):
            return f"a {type(node).__name__} does not fit a stack of trained rows"
        if node.rows != self.like.rows or node.value.shape != self.value.shape:
            return f"trained rows {node.rows} do not fit a stack of rows {self.like.rows}"
        return None

    def fill(self, node: Adapted | None) -> TrainedRows:
        """Return the rows; None gives rows that are switched off."""
        if node is None:
            value, scale = _zeros(self.value), jnp.zeros((), jnp.float32)
            return dataclasses.replace(self.like, value=value, scale=scale)
        assert isinstance(node, TrainedRows)
        return dataclasses.replace(node, w=None)


def _abstract(x: Any, slots: int | None) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of an array, without the axis of slots if there is one."""
    return jax.ShapeDtypeStruct(x.shape[slots is not None :], x.dtype)


def _zeros(like: jax.ShapeDtypeStruct | None) -> Any:
    return None if like is None else jnp.zeros(like.shape, like.dtype)


def _padded(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Return `x` with zeros behind it along the axis in which `like` is longer: the rank."""
    widths = [(0, new - old) for new, old in zip(like.shape, x.shape, strict=True)]
    return jnp.pad(x.astype(like.dtype), widths)
