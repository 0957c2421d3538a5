"""`Frame`: the shape that adapters of one weight are brought to, so that they can be stacked."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.layout import Layout
from lora_jax.core.slots import new_slot
from lora_jax.core.weights import Adapted, LoraWeight, TrainedLeaf, TrainedRows


class Frame(abc.ABC):
    """What the adapters of one weight have in common in a stack."""

    @property
    @abc.abstractmethod
    def fields(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes and dtypes of a filled frame's arrays, without their slots."""

    @abc.abstractmethod
    def misfit(self, node: Adapted) -> str | None:
        """Return why an adapter has no place in this frame, None if it has."""

    @abc.abstractmethod
    def fill(self, node: Adapted | None) -> Adapted:
        """Return an adapter padded to this frame; None gives one without an effect."""

    def too_wide(self, node: Adapted) -> str | None:
        """Return which array of an adapter would be rounded in this frame, None if none would."""
        for field, like in self.fields.items():
            dtype = getattr(getattr(node, field), "dtype", like.dtype)
            if _widest(dtype, like.dtype) != like.dtype:
                return (
                    f"{field} is {dtype}, which a stack of {like.dtype} would round; convert it "
                    "before"
                )
        return None


def frame_of(nodes: Sequence[Adapted], rank: int | None = None) -> Frame:
    """Return the smallest frame in which adapters of one weight fit, single ones or stacks.

    `rank` is a larger one for the factors.
    """
    first = nodes[0]
    alike: Any = [x for x in nodes if type(x) is type(first)]
    if isinstance(first, LoraWeight):
        return LoraFrame.of(alike, rank)
    return RowsFrame.of(alike) if isinstance(first, TrainedRows) else LeafFrame.of(alike)


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
        layout = nodes[0].layout
        rank, batch = max([rank or 0, *(node.rank for node in nodes)]), layout.axes.count("b")
        a, b, scale = (_common(nodes, field) for field in ("a", "b", "scale"))
        has_magnitude = any(node.magnitude is not None for node in nodes)
        return cls(
            jax.ShapeDtypeStruct((*a.shape[:-1], rank), a.dtype),
            jax.ShapeDtypeStruct((*b.shape[:batch], rank, *b.shape[batch + 1 :]), b.dtype),
            scale,
            _common(nodes, "magnitude") if has_magnitude else None,
            layout,
            max(node.dropout for node in nodes),
        )

    @property
    def fields(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes and dtypes of a filled frame's arrays, without their slots."""
        found = {"a": self.a, "b": self.b, "scale": self.scale}
        return found if self.magnitude is None else found | {"magnitude": self.magnitude}

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
            return (
                f"rank {node.rank} does not fit a stack of rank {self.a.shape[-1]}; make the stack "
                f"with rank={node.rank} or more"
            )
        if node.magnitude is not None and self.magnitude is None:
            return "the adapter has a magnitude (DoRA), and no adapter of the stack has one"
        if node.dropout and not self.dropout:
            return f"dropout {node.dropout:g} does not fit a stack without dropout"
        return None

    def fill(self, node: Adapted | None) -> LoraWeight:
        """Return factors padded with zeros, whose gradients are zero too, and what is its own."""
        if node is None:
            zeros: dict[str, Any] = _zeros(self.fields)
            slot = new_slot(0, 0, False)
        else:
            assert isinstance(node, LoraWeight)
            zeros = {field: _padded(getattr(node, field), x) for field, x in self.fields.items()}
            slot = node.slot
            if slot is None:
                slot = new_slot(node.rank, node.dropout, node.magnitude is not None)
        return LoraWeight(None, **zeros, slot=slot, layout=self.layout, dropout=self.dropout)


@dataclasses.dataclass(frozen=True)
class LeafFrame(Frame):
    """The frame of fully trained leaves: all have one shape."""

    value: jax.ShapeDtypeStruct
    scale: jax.ShapeDtypeStruct  # as of a leaf that trains in some layers, if there is one

    @classmethod
    def of(cls, nodes: Sequence[TrainedLeaf]) -> "LeafFrame":
        """Return the frame that fits all of these."""
        return cls(_common(nodes, "value"), _common(nodes, "scale"))

    @property
    def fields(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes and dtypes of a filled frame's arrays, without their slots."""
        return {"value": self.value, "scale": self.scale}

    def misfit(self, node: Adapted) -> str | None:
        """Return why a leaf has no place in this frame, None if it has."""
        if not isinstance(node, TrainedLeaf):
            return f"a {type(node).__name__} does not fit a stack of fully trained leaves"
        if node.value.shape != self.value.shape:
            return f"a leaf {node.value.shape} does not fit {self.value.shape}"
        if node.scale.shape not in ((), self.scale.shape):
            return "it trains in some layers only, and no adapter of the stack does"
        return None

    def fill(self, node: Adapted | None) -> TrainedLeaf:
        """Return the leaf; None gives one that is switched off."""
        if node is None:
            return TrainedLeaf(None, **_zeros(self.fields), slot=jnp.zeros(()))
        assert isinstance(node, TrainedLeaf)
        scale = jnp.broadcast_to(node.scale.astype(self.scale.dtype), self.scale.shape)
        value = node.value.astype(self.value.dtype)
        return TrainedLeaf(None, value, scale, jnp.ones(()) if node.slot is None else node.slot)


@dataclasses.dataclass(frozen=True)
class RowsFrame(Frame):
    """The frame of trained rows: all adapters train the same ones."""

    value: jax.ShapeDtypeStruct
    scale: jax.ShapeDtypeStruct
    like: TrainedRows

    @classmethod
    def of(cls, nodes: Sequence[TrainedRows]) -> "RowsFrame":
        """Return the frame of rows like these."""
        like = dataclasses.replace(nodes[0], w=None, value=None, scale=None, slot=None)
        return cls(_common(nodes, "value"), _common(nodes, "scale"), like)

    @property
    def fields(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes and dtypes of a filled frame's arrays, without their slots."""
        return {"value": self.value, "scale": self.scale}

    def misfit(self, node: Adapted) -> str | None:
        """Return why rows have no place in this frame, None if they have."""
        if not isinstance(node, TrainedRows):
            return f"a {type(node).__name__} does not fit a stack of trained rows"
        ours = self.like.rows, self.like.axis, self.like.layout, self.value.shape
        if (node.rows, node.axis, node.layout, node.value.shape) != ours:
            return (
                f"trained rows {_some(node.rows)} along axis {node.axis} do not fit a stack of "
                f"rows {_some(self.like.rows)} along axis {self.like.axis}; train the same ones"
            )
        return None

    def fill(self, node: Adapted | None) -> TrainedRows:
        """Return the rows; None gives rows that are switched off."""
        if node is None:
            return dataclasses.replace(self.like, **_zeros(self.fields), slot=jnp.zeros(()))
        assert isinstance(node, TrainedRows)
        return dataclasses.replace(
            self.like,
            value=node.value.astype(self.value.dtype),
            scale=node.scale.astype(self.scale.dtype),
            slot=jnp.ones(()) if node.slot is None else node.slot,
        )


def _common(nodes: Sequence[Any], field: str) -> jax.ShapeDtypeStruct:
    """Return the shape, without slots, that fits the arrays of a field, and their widest dtype."""
    arrays = [(node.slots, x) for node in nodes if (x := getattr(node, field)) is not None]
    shapes = [x.shape[slots is not None :] for slots, x in arrays]
    return jax.ShapeDtypeStruct(max(shapes, key=len), _widest(*(x.dtype for _, x in arrays)))


def _widest(*dtypes: Any) -> Any:
    """Return the dtype that represents all numbers of these dtypes."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    # JAX promotes no 8-bit numbers by itself.
    wide = [jnp.dtype(jnp.float32) if dtype.itemsize == 1 else dtype for dtype in dtypes]
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*wide)


def _zeros(fields: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    return {field: jnp.zeros(x.shape, x.dtype) for field, x in fields.items()}


def _padded(x: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Return `x` with zeros behind it along the axis in which `like` is longer: the rank.

    None, the magnitude of an adapter without one, becomes zeros.
    """
    if x is None:
        return jnp.zeros(like.shape, like.dtype)
    if x.shape == like.shape:
        return x.astype(like.dtype)
    widths = [(0, new - old) for new, old in zip(like.shape, x.shape, strict=True)]
    return jnp.pad(x.astype(like.dtype), widths)


def _some(rows: tuple[int, ...]) -> str:
    more = f", ... {len(rows) - 4} more" if len(rows) > 4 else ""
    return f"({', '.join(map(str, rows[:4]))}{more})"
