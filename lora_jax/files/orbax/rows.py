"""What a format of checkpoints says: where a weight's factors are, and what their axes mean."""

import dataclasses
from collections.abc import Iterator, Mapping

from lora_jax.files.naming import Entry, Naming
from lora_jax.files.naming.patterns import match

RANK, LAYERS = "r", "l"  # letters of the rank, and of stacked layers


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of weight, and its factors.

    In paths, `{n}` stands for one segment and `{*m}` for several, as in a naming. Axes are letters:
    `r` is the rank, `l` a stack of layers, and the others are inputs or outputs.

    Attributes:
      weight, a, b: the paths; each placeholder is in all three.
      axes: of the weight, "n d h".
      outs: which of these letters are outputs, "n h".
      factors: the axes of A and B where they are not `[layers, inputs, r]` and
        `[layers, r, outputs]` in the order of the weight. An output among A's axes has its own A
        for each of its indices. A letter of B that the weight lacks is summed over; it has the
        size of the weight's first input.
      flat: whether several inputs, or outputs, may be one axis of a factor.
      scaled: whether the format's scale applies here.
      group: weights of rows with one name here have one rank in the trainer's configuration; ""
        where each has its own rank.
    """

    weight: str
    a: str
    b: str
    axes: str
    outs: str
    factors: tuple[str, str] | None = None
    flat: bool = False
    scaled: bool = True
    group: str = ""

    @property
    def letters(self) -> tuple[str, ...]:
        """The letters of the weight's axes."""
        return tuple(self.axes.split())

    @property
    def inputs(self) -> tuple[str, ...]:
        """The letters of the inputs, in the weight's order."""
        return tuple(x for x in self.letters if x not in (LAYERS, *self.outs.split()))

    @property
    def outputs(self) -> tuple[str, ...]:
        """The letters of the outputs, in the weight's order."""
        return tuple(x for x in self.letters if x in self.outs.split())

    @property
    def layout(self) -> str:
        """The `Layout.axes` of the weight."""
        roles = {LAYERS: "b"} | dict.fromkeys(self.outputs, "o")
        return "".join(roles.get(x, "i") for x in self.letters)

    def alternatives(self) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
        """Yield the axes that A and B may have; a stack of layers is first or second in both."""
        if self.factors is not None:
            yield tuple(self.factors[0].split()), tuple(self.factors[1].split())
            return
        a, b = (*self.inputs, RANK), (RANK, *self.outputs)
        if LAYERS not in self.letters:
            yield a, b
            return
        for i in (0, 1):
            yield (*a[:i], LAYERS, *a[i:]), (*b[:i], LAYERS, *b[i:])


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of checkpoints: the tree that a trainer keeps, with LoRA's factors in it.

    Attributes:
      title: what messages call it.
      rows: the kinds of weights; a row is chosen by the path of A and by the shapes.
      names: rows of a naming, Hugging Face's names of the weights. Where a path has several, the
        one with the weight's layout counts.
      scale: how updates are scaled: "alpha" (alpha over rank, and the checkpoint does not say
        alpha), "alpha = rank" (the same, but alpha is the rank if it is not given), or "none".
      wrapper: the key under which a checkpoint has the tree; "" for none.
      grown_queries: the ends of the paths of weights that hold queries divided by the square root
        of the head's size, the last axis; Hugging Face's are that much larger.
    """

    title: str
    rows: tuple[Row, ...]
    names: tuple[Entry, ...] = ()
    scale: str = "alpha"
    wrapper: str = ""
    grown_queries: tuple[str, ...] = ()
    not_of: tuple[str, ...] = ()
    instead: str = ""

    def naming(self, layouts: Mapping[str, str]) -> Naming:
        """Return Hugging Face's names of weights, by their paths and layouts."""
        return Naming(
            tuple(
                entry
                for entry in self.names
                if any(
                    match(template, path) is not None and entry.layout == layout
                    for template in entry.paths
                    for path, layout in layouts.items()
                )
            )
        )
