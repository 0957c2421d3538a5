"""Products of entries, each with the factor of its group, where groups are many and small."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Entries in tiles of one group each, so that a tile is one product with one factor.

    Where there are no more entries than groups, every tile has one entry. Otherwise the tiles are
    as long as a group is on average: then both the factors of all tiles and their entries are at
    most about twice what there is of them, whatever the groups' sizes are.
    """

    groups: jax.Array  # [tiles]: the group of each
    #: [entries]: the place of each in [tiles, length]; past the end, of one in no group
    places: jax.Array
    length: int

    @classmethod
    def of(cls, group: jax.Array, count: int) -> "Tiles":
        """Return the tiles of entries whose groups are `[entries]`; `count` stands for none."""
        entries = len(group)
        length = max(1, entries // max(count, 1))
        if length == 1:
            own = jnp.arange(entries, dtype=jnp.int32)
            places = jnp.where(group < count, own, entries)
            return cls(jnp.minimum(group, count - 1), places, 1)
        sizes = jnp.zeros(count, jnp.int32).at[group].add(1, mode="drop")
        needed = -(-sizes // length)  # tiles of each group
        ends = jnp.cumsum(needed)
        number = entries // length + count  # of tiles, at most
        order = jnp.argsort(group)
        sorted_groups = group[order]
        known = jnp.minimum(sorted_groups, count - 1)
        first = (jnp.cumsum(sizes) - sizes)[known]  # of the group, among the sorted
        own = jnp.arange(entries, dtype=jnp.int32)
        places = (ends - needed)[known] * length + own - first
        places = jnp.where(sorted_groups < count, places, number * length)
        groups = jnp.searchsorted(ends, jnp.arange(number, dtype=jnp.int32), side="right")
        places = jnp.zeros(entries, jnp.int32).at[order].set(places.astype(jnp.int32))
        return cls(jnp.minimum(groups, count - 1), places, length)

    def split(self, x: jax.Array) -> jax.Array:
        """Return entries `[entries, ...]` as `[tiles, length, ...]`, with zeros between them."""
        shape = (len(self.groups) * self.length, *x.shape[1:])
        if self.length > 1:
            x = jnp.zeros(shape, x.dtype).at[self.places].add(x, mode="drop")
        return x.reshape(len(self.groups), self.length, *x.shape[1:])

    def join(self, y: jax.Array) -> jax.Array:
        """Return `[tiles, length, ...]` as entries `[entries, ...]`; zeros for one in no group."""
        flat = y.reshape(-1, *y.shape[2:])
        return flat.at[self.places].get(mode="fill", fill_value=0)

    def multiply(
        self, x: jax.Array, factors: jax.Array, precision: lax.PrecisionLike, dtype: jnp.dtype
    ) -> jax.Array:
        """Multiply `[tiles, length, in]` with `[groups, in, out]`, each tile with its group's."""
        numbers = (((2,), (1,)), ((0,), (0,)))
        return lax.dot_general(
            x, factors[self.groups], numbers, precision, preferred_element_type=dtype
        )
