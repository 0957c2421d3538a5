"""Where one leaf of a tree is in PyTorch's files, and how its arrays convert."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from einops import rearrange

from lora_jax.core.errors import StructureError
from lora_jax.files.naming.entry import KINDS, RANK, Entry
from lora_jax.files.naming.patterns import Groups, fill, text


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one leaf is in PyTorch's files.

    All arrays here belong to one layer, without stacked axes; `layers` lists the layers. If several
    leaves share a tensor, the PyTorch shape is that of this leaf's part, which is `[start, stop)`
    of `total` along the out axis.
    """

    path: str
    shape: tuple[int, ...]
    entry: Entry
    filled: Mapping[str, str]
    part: int = 0  # the index of this leaf's path in the entry's paths
    start: int = 0
    total: int = 0

    def problem(self) -> str | None:
        """Return why the leaf's shape does not fit its row, or None if it does."""
        groups = self.entry.groups(len(self.shape))[1]
        if len(groups) != len(self.shape):
            axes = self.entry.axes or KINDS[self.entry.kind][1]
            return f"{self.path}: has shape {self.shape}, but its row has the axes {axes!r}"
        for group, size in zip(groups, self.shape, strict=True):
            unknown = [x for x in group if x not in self.entry.sizes]
            if len(unknown) > 1 or size != math.prod(self.sizes[x] for x in group):
                return (
                    f"{self.path}: axis ({' '.join(group)}) has size {size}, which does not fit "
                    f"the row's sizes {dict(self.entry.sizes)}"
                )
        return None

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """The size of every letter, from the leaf's shape and the row's `sizes`."""
        sizes = dict(self.entry.sizes)
        for group, size in zip(self.entry.groups(len(self.shape))[1], self.shape, strict=True):
            known = math.prod(sizes.get(x, 1) for x in group)
            sizes.update({x: size // known for x in group if x not in sizes})
        return sizes

    def among(self, places: Mapping[str, "Place"]) -> "Place":
        """Return this place with its part of a shared tensor, from the other leaves' shapes."""
        own, axis = self.torch_shape, self.entry.out_axis
        if len(self.entry.paths) == 1:
            return dataclasses.replace(self, total=own[axis] if own else 0)
        widths = []
        for i, template in enumerate(self.entry.paths):
            other = places.get(fill(template, self.filled))
            known = self.entry.split[i] if self.entry.split else own[axis]
            widths.append(other.torch_shape[axis] if other else known)
        start = sum(widths[: self.part])
        return dataclasses.replace(self, start=start, total=sum(widths))

    @property
    def stop(self) -> int:
        """Where the leaf's part of PyTorch's out axis ends."""
        shape = self.torch_shape
        return self.start + (shape[self.entry.out_axis] if shape else 0)

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """One layer's shape in PyTorch, with joined tensors (see the class)."""
        left = self.entry.groups(len(self.shape))[0]
        return tuple(math.prod(self.sizes[x] for x in group) for group in left)

    @property
    def widths(self) -> tuple[int, ...]:
        """Sizes along PyTorch's out axis of the tensors that are joined in this leaf."""
        count, shape = len(self.entry.torch_names), self.torch_shape
        if count == 1:
            return (shape[self.entry.out_axis],) if shape else (0,)
        size = shape[self.entry.out_axis]
        widths = self.entry.split or (size // count,) * count
        if sum(widths) != size or len(widths) != count:
            raise StructureError(
                f"{self.path}: {size} outputs are not {' + '.join(map(str, widths))}; add to the "
                f"naming's row split=(...), the outputs of {', '.join(self.entry.torch_names)}"
            )
        return widths

    @property
    def shared_with(self) -> tuple[str, ...]:
        """The paths of all leaves in the tensor, this one's among them."""
        return tuple(fill(path, self.filled) for path in self.entry.paths)

    def layers(self) -> list[tuple[tuple[int, ...], tuple[str, ...]]]:
        """List each layer: its index along the stacked axes, and the names of its tensors."""
        counts = [range(self.sizes[x]) for x in self.entry.stacked]
        return [(index, tuple(self._names(index))) for index in itertools.product(*counts)]

    def modules(self) -> list[tuple[tuple[int, ...], tuple[str, ...], int | None]]:
        """List each module: its index along the batch axes, its names, and the expert's number.

        Without experts this is `layers` with None as the third item. With experts, each expert is a
        module, all with the same names.

        >>> row = Entry("h.{n}.up", "h/up", "experts", "e o i -> e n i o")
        >>> Place("h/up", (2, 1, 4, 3), row, {}).modules()
        [((0, 0), ('h.0.up',), 0), ((1, 0), ('h.0.up',), 1)]
        """
        if not self.entry.has_experts:
            return [(index, names, None) for index, names in self.layers()]
        found: list[tuple[tuple[int, ...], tuple[str, ...], int | None]] = []
        experts = self.entry.groups(0)[0][0]
        for index in itertools.product(*(range(size) for size in self.batch)):
            numbers = dict(zip(self.entry.batch, index, strict=True))
            expert = 0
            for letter in experts:
                expert = expert * self.sizes[letter] + numbers[letter]
            names = tuple(self._names(tuple(numbers[x] for x in self.entry.stacked)))
            found.append((index, names, expert))
        return found

    @property
    def batch(self) -> tuple[int, ...]:
        """The sizes of the leaf's batch axes: stacked ones and experts."""
        return tuple(self.sizes[letter] for letter in self.entry.batch)

    def _names(self, index: tuple[int, ...]) -> Iterator[str]:
        first = self.entry.first
        numbers = {x: str(first + i) for x, i in zip(self.entry.stacked, index, strict=True)}
        for name in self.entry.torch_names:
            yield fill(name, {k: v.replace("/", ".") for k, v in self.filled.items()} | numbers)

    def at(self, index: tuple[int, ...]) -> tuple[Any, ...]:
        """Return the indices into the leaf that select one layer."""
        numbers = dict(zip(self.entry.stacked, index, strict=True))
        groups = self.entry.groups(len(self.shape))[1]
        return tuple(numbers.get(g[0], slice(None)) if g else slice(None) for g in groups)

    def part_of(self, joined: np.ndarray) -> np.ndarray:
        """Return the leaf's part of a tensor that it shares, or the whole tensor, as a view."""
        if len(self.entry.paths) == 1:
            return joined
        return joined[(slice(None),) * self.entry.out_axis + (slice(self.start, self.stop),)]

    def permutation(self) -> tuple[int, ...]:
        """Return the PyTorch axis of each axis of a layer, if a layer is one transposed tensor.

        Otherwise, and for a number without axes, the result is empty.

        >>> row = Entry("h.{n}.w", "h/w", "linear", "o i -> n i o")
        >>> Place("h/w", (2, 4, 3), row, {}).permutation()
        (1, 0)
        """
        if len(self.entry.torch_names) > 1 or len(self.entry.paths) > 1:
            return ()
        left, right = self._sides("iob")
        if any(len(group) != 1 for group in (*left, *right)):
            return ()
        return tuple(left.index(group) for group in right)

    def weight_to_tree(self, weight: Any) -> Any:
        """Convert one layer's weight from PyTorch's axes to the leaf's."""
        left, right = self._sides("iob")
        return self._rearrange(weight, left, right)

    def weight_to_torch(self, weight: Any) -> Any:
        """Convert one layer's weight from the leaf's axes to PyTorch's."""
        left, right = self._sides("iob")
        return self._rearrange(weight, right, left)

    def a_to_tree(self, a: Any) -> Any:
        """Convert `[rank, *PyTorch's in axes]` to `[*in, rank]`."""
        left, right = self._sides("i")
        return self._rearrange(a, ((RANK,), *left), (*right, (RANK,)))

    def a_to_torch(self, a: Any) -> Any:
        """Convert `[*in, rank]` to `[rank, *PyTorch's in axes]`."""
        left, right = self._sides("i")
        return self._rearrange(a, (*right, (RANK,)), ((RANK,), *left))

    def b_to_tree(self, b: Any) -> Any:
        """Convert `[PyTorch's out, rank]` to `[rank, *out]`."""
        left, right = self._sides("o")
        return self._rearrange(b, (*left, (RANK,)), ((RANK,), *right))

    def b_to_torch(self, b: Any) -> Any:
        """Convert `[rank, *out]` to `[PyTorch's out, rank]`."""
        left, right = self._sides("o")
        return self._rearrange(b, ((RANK,), *right), (*left, (RANK,)))

    def out_to_tree(self, values: Any) -> Any:
        """Convert one number per output (DoRA's magnitude): `[PyTorch's out]` to `[*out]`."""
        left, right = self._sides("o")
        return self._rearrange(values, left, right)

    def out_to_torch(self, values: Any) -> Any:
        """Convert `[*out]` to `[PyTorch's out]`."""
        left, right = self._sides("o")
        return self._rearrange(values, right, left)

    def _sides(self, roles: str) -> tuple[Groups, Groups]:
        """Return the axes with these roles on both sides, without stacked ones."""
        left, right = self.entry.groups(len(self.shape))
        stacked = self.entry.stacked
        if self.entry.kind:
            known = self.entry.roles
            left = tuple(g for g in left if not g or known[g[0]] in roles)
            right = tuple(g for g in right if not g or known[g[0]] in roles)
        return left, tuple(g for g in right if not g or g[0] not in stacked)

    def _rearrange(self, array: Any, left: Groups, right: Groups) -> Any:
        used = {x for group in left for x in group if x != RANK}
        sizes = {x: size for x, size in self.sizes.items() if x in used}
        return rearrange(np.asarray(array), f"{text(left)} -> {text(right)}", **sizes)
