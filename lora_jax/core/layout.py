"""`Layout`: which axes of a weight are batch, in and out."""

import dataclasses
import math

from lora_jax.core.errors import LayoutError


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of a weight are batch, in and out: one letter per axis, `b`, `i` or `o`.

    A dense kernel `[in, out]` is "io", an attention kernel `[embed, heads, head_dim]` is "ioo", a
    stack of dense kernels `[layers, in, out]` is "bio", and a convolution kernel
    `[height, width, in, out]` is "iiio".

    Args:
      axes: the letters, one per axis of the weight.
      uses: the primitives that use the weight ("dot_general", "gather", ...). Only `summary` shows
        them; they decide nothing, and layouts that differ in nothing else are equal.
      lookup_only: the function only looks up rows of the weight, so that "kaiming" and "gaussian"
        initialize A, not B, to zero. `init` passes it to the initializer. In the tree that `init`
        returns it is False, because an adapter file does not say it, and trees from both sources
        must have the same structure.

    Raises:
      LayoutError: `axes` has another letter, no in axis or no out axis.

    >>> layout = Layout("bio")
    >>> layout.a_shape((12, 768, 3072), rank=8), layout.b_shape((12, 768, 3072), rank=8)
    ((12, 768, 8), (12, 8, 3072))
    """

    axes: str
    uses: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    lookup_only: bool = False

    def __post_init__(self) -> None:
        if not set(self.axes) <= set("bio") or "i" not in self.axes or "o" not in self.axes:
            raise LayoutError(
                f"layout {self.axes!r} must have one letter per axis: b(atch), i(n) or o(ut), "
                "with at least one i and one o"
            )

    def positions(self, kinds: str) -> tuple[int, ...]:
        """Return the axes whose letter is in `kinds`: `Layout("bio").positions("bo")` is (0, 2)."""
        return tuple(i for i, kind in enumerate(self.axes) if kind in kinds)

    def select(self, kinds: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the sizes in `shape` of the axes whose letter is in `kinds`."""
        return tuple(shape[i] for i in self.positions(kinds))

    def a_shape(self, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
        """Return the shape of A, `[*batch, *in, rank]`, for a weight of this shape."""
        return (*self.select("b", shape), *self.select("i", shape), rank)

    def b_shape(self, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
        """Return the shape of B, `[*batch, rank, *out]`, for a weight of this shape."""
        return (*self.select("b", shape), rank, *self.select("o", shape))

    def magnitude_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a magnitude, `[*batch, *out]`, for a weight of this shape."""
        return (*self.select("b", shape), *self.select("o", shape))

    def fan_in(self, shape: tuple[int, ...]) -> int:
        """Return the product of the in axes: the number of inputs of each output."""
        return math.prod(self.select("i", shape))

    def fan_out(self, shape: tuple[int, ...]) -> int:
        """Return the product of the out axes."""
        return math.prod(self.select("o", shape))


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def subscripts(layout: Layout) -> tuple[str, str, str, str]:
    """Return einsum subscripts of A, B, scale and W: "aZ", "Zb", "", "ab" for "io"; Z is rank."""
    batch, ins, outs, every = (pick(layout, kinds) for kinds in ("b", "i", "o", "bio"))
    return batch + ins + "Z", batch + "Z" + outs, batch, every


def pick(layout: Layout, kinds: str) -> str:
    return "".join(LETTERS[i] for i in layout.positions(kinds))
