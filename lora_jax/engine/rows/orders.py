"""Permutations of the rows of a batch, as a mixture of experts makes them and undoes them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

#: Axes of rows of more entries than this are tried at some of their rows only.
_TRIED_WHOLE = 1 << 16


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """The order that a `sort` of the program gives to the entries of an axis with rows.

    Only the entries' places depend on all rows: entry n of what is in this order was entry `P[n]`.
    """

    where: str  # what mixes rows here, as a sentence
    size: int  # of the axis, `[outer, rows, inner]`
    inner: int
    rows: int
    group: Any  # which groups it sorts by, if it does; see `Fact.group`

    def tried(self) -> np.ndarray:
        """Return numbers of entries, `[outer, rows, inner]`: of all rows, or of four."""
        every = np.arange(self.size).reshape(-1, self.rows, self.inner)
        return every if self.size <= _TRIED_WHOLE else every[:, [0, 1, 2, self.rows - 1]]


Kind = Literal["constant", "place", "order", "inverse"]


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """What is known of integers: entry n is `of(n)`, `of(P[n])` or `of(n')` with `P[n'] = n`."""

    kind: Kind
    of: Callable[[np.ndarray], np.ndarray]
    order: Order | None = None
    is_given: bool = False  # it is P itself, as the `sort` returns it

    def is_identity(self, size: int) -> bool:
        """Return whether entry n of these is n (or `P[n]`, or n'), of `size` entries."""
        entries = np.arange(size) if self.order is None else self.order.tried()
        return self.kind != "constant" and bool(np.all(self.of(entries) == entries))

    def is_constant(self, value: int) -> bool:
        """Return whether all of these are this number."""
        return self.kind == "constant" and bool(np.all(self.of(np.zeros(1)) == value))

    def stays_in_row(self, inner: int) -> bool:
        """Return whether these pick, for every entry of the order, one of the same row.

        They pick among entries `[outer, rows, inner]`, and in each row alike.
        """
        if self.order is None or self.kind != "order":
            return False
        entries, rows = self.order.tried(), self.order.rows
        outer, rest = np.divmod(self.of(entries), rows * inner)
        row, inside = np.divmod(rest, inner)
        alike = np.all(outer == outer[:, :1]) and np.all(inside == inside[:, :1])
        return bool(alike and np.all(row == entries // self.order.inner % rows))


PLACE = Index("place", lambda n: n)


def constant(value: Any) -> Index | None:
    """Return what is known of a literal; None unless it is one number or a truth value."""
    number = np.asarray(value)
    if number.ndim or not (jnp.issubdtype(number.dtype, jnp.number) or number.dtype == bool):
        return None
    return Index("constant", lambda n: np.full(1, number))


def computed(primitive: str, inputs: Sequence[Index]) -> Index | None:
    """Return what is known of a number that is computed from others, entry by entry."""
    fn = _ARITHMETIC.get(primitive)
    kinds = {(x.kind, x.order) for x in inputs if x.kind != "constant"}
    if fn is None or len(kinds) > 1:
        return None
    constant: tuple[Kind, Order | None] = ("constant", None)
    kind, order = next(iter(kinds), constant)
    return Index(kind, lambda n: fn(*(x.of(n) for x in inputs)), order)


def _first(x: np.ndarray, *_: np.ndarray) -> np.ndarray:
    return x


def _divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the quotient rounded towards zero, as XLA has it."""
    return np.sign(x) * np.sign(y) * (np.abs(x) // np.maximum(np.abs(y), 1))


_ARITHMETIC: dict[str, Callable[..., np.ndarray]] = {
    **{"add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative},
    **{"div": _divide, "rem": np.fmod, "sign": np.sign, "abs": np.abs},
    **{"max": np.maximum, "min": np.minimum, "clamp": lambda lo, x, hi: np.clip(x, lo, hi)},
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal},
    **{"gt": np.greater, "ge": np.greater_equal},
    **{"and": np.bitwise_and, "or": np.bitwise_or, "not": np.invert},
    "select_n": lambda which, *cases: np.choose(which.astype(np.int64), cases),
    **dict.fromkeys(
        ("convert_element_type", "broadcast_in_dim", "reshape", "squeeze", "expand_dims"), _first
    ),
    **dict.fromkeys(("copy", "copy_p", "stop_gradient"), _first),
}
