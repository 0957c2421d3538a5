"""`Context`: the state of one run of the interpreter: policy, warnings given, uses seen."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from lora_jax.core.errors import DenseError, DenseWarning
from lora_jax.engine import jaxprs
from lora_jax.engine.arithmetic import base_values, to_dense
from lora_jax.engine.forms import PLAIN, Forms
from lora_jax.engine.lazy_weight import Axis, LazyWeight
from lora_jax.engine.products import Hidden
from lora_jax.engine.remat import mark_sum
from lora_jax.engine.rows.mapped import MAPPED
from lora_jax.engine.rows.places import Maker, Place, Places
from lora_jax.engine.rows.slots import NoPlaceForRows
from lora_jax.engine.uses import Use, dense_uses, uses_of

#: What `on_dense` may say: warn once per call site, raise, or materialize the weight silently.
POLICIES = ("warn", "error", "allow")


#: What became of a weight, of this shape; and what to do about it.
_MATERIALIZED = "W + scale·A·B {} is materialized", "Leave the weight out with exclude="
_DEQUANTIZED = "its codes are dequantized to {}", "Leave the weight as floating numbers"


class Context:
    """The state of one run; `uses` is a list while uses are inferred, else None.

    `rules` are the user-defined ones, by primitive name.
    """

    def __init__(
        self,
        on_dense: str = "warn",
        uses: list[Use] | None = None,
        rules: Mapping[str, Any] | None = None,
        forms: Forms = PLAIN,
        places: Places | None = None,
        maps_rows: bool = False,
    ):
        self.on_dense = on_dense
        self.uses = uses
        self.rules = rules or {}
        self.forms = forms
        self._places = places or {}  # where the rows are, in a batch whose rows use many adapters
        found = [x.order for each in self._places.values() for x in each if x is not None]
        self._orders: dict[Maker, Any] = {x: None for x in found if x is not None}
        self.maps_rows = maps_rows  # each of them is computed alone, by `jax.vmap`
        self.jitted: dict[Any, Any] = {}
        self.hidden: dict[int, Hidden] = {}  # id of an equation -> its x·A, if computed in a group
        # Where the interpreter is; changed by the four context managers below.
        self.made: Mapping[Any, Any] = {}  # variable of the program -> the equation that makes it
        self.enclosing: Any = None  # the innermost equation around here that has a source line
        self.in_remat = False
        self.in_derivative = False
        self._sites = 0
        self._warned: set[tuple[str, str, str]] = set()

    @property
    def infers(self) -> bool:
        """Whether this run only watches how weights are used."""
        return self.uses is not None

    def inside(self, eqn: Any) -> contextlib.AbstractContextManager[None]:
        """Enter the program that `eqn` contains: its line is named where a line is missing."""
        return self._with(enclosing=eqn)

    def inside_program(self, jaxpr: Any) -> contextlib.AbstractContextManager[None]:
        """Enter a program: rules may ask which of its equations made a value."""
        return self._with(made=jaxprs.producers(jaxpr))

    def inside_remat(self) -> contextlib.AbstractContextManager[None]:
        """Enter a `jax.checkpoint`: sums of adapted products get the mark its policy looks for."""
        return self._with(in_remat=True)

    def inside_derivative(self) -> contextlib.AbstractContextManager[None]:
        """Enter a user-defined JVP rule, in which JAX may transpose what depends on tangents."""
        return self._with(in_derivative=True)

    @contextlib.contextmanager
    def _with(self, **state: Any) -> Iterator[None]:
        before = {name: getattr(self, name) for name in state}
        vars(self).update(state)
        try:
            yield
        finally:
            vars(self).update(before)

    def mark_sum(self, total: jax.Array) -> jax.Array:
        """Mark the sum of an adapted product, where a `jax.checkpoint` policy may look for it."""
        return mark_sum(total) if self.in_remat else total

    def next_site(self) -> int:
        """Return a number that no other contraction of this run has."""
        self._sites += 1
        return self._sites

    def record(
        self,
        lazy: LazyWeight,
        eqn: Any,
        summed: Sequence[Axis],
        batch: Sequence[Axis],
        is_operand: bool = False,
    ) -> None:
        """Note a contraction: summed axes are in; batched and indexed-away axes are batch."""
        if self.uses is None:
            return
        kinds: dict[int, str] = {}
        for axis in lazy.axes:
            kind = "i" if axis in summed else "b" if axis in batch else "o"
            # Where one part of a parameter axis is summed and another is not, the sum decides.
            kinds.update({o: kind for o in axis.origins if kinds.get(o) != "i"})
        # An axis that the view no longer has was indexed away, or had size one and was squeezed.
        origin = lazy.origin
        kinds = dict.fromkeys(range(origin.ndim), "o") | dict.fromkeys(origin.indexed, "b") | kinds
        name, line = eqn.primitive.name, self.line(eqn)
        if origin.looked_up and not {"i", "o"} <= set(kinds.values()):
            # Rows were looked up, then contracted over their whole length: `table[ids] @ matrix`.
            self.uses += dense_uses(lazy, name, line)
        else:
            self.uses += uses_of(lazy, name, line, kinds, is_operand or origin.altered)

    def place_of_rows(self, eqn: Any, operand: int) -> Place:
        """Return where an input of an equation has the rows of the batch.

        Raises:
          NoPlaceForRows: it has none, or it is not known.
        """
        place = self._place(eqn, operand)
        if place is None or place.order is not None:
            raise NoPlaceForRows
        return place

    def rows_of_entries(self, eqn: Any, operand: int, rows: int) -> jax.Array:
        """Return the number of the row of each entry, where the entries of all rows were sorted.

        Raises:
          NoPlaceForRows: it is not known.
        """
        place = self._place(eqn, operand)
        if place is None or place.order is None or (order := self._orders[place.order]) is None:
            raise NoPlaceForRows
        return order // place.inner % rows

    def _place(self, eqn: Any, operand: int) -> Place | None:
        places = self._places.get(id(eqn), ())
        return places[operand] if operand < len(places) else None

    def stands_alone(self, eqn: Any) -> bool:
        """Return whether an equation is in no stretch: its outputs are kept, or it is replaced."""
        makes_order = any(maker.eqn == id(eqn) for maker in self._orders)
        return makes_order or (self.maps_rows and eqn.primitive.name in MAPPED)

    def keep_orders(self, eqn: Any, outs: Sequence[Any]) -> None:
        """Keep the orders that an equation makes, for `rows_of_entries`."""
        for maker in self._orders:
            if maker.eqn == id(eqn):
                self._orders[maker] = outs[maker.output]

    def with_line(self, eqn: Any) -> Any:
        """Return the innermost equation that has a source line: `eqn` or one around it."""
        return eqn if self.enclosing is None or jaxprs.source_line(eqn) else self.enclosing

    def line(self, eqn: Any) -> str:
        """Return the user's line that made `eqn`; for one that JAX inserted, the line around it."""
        return jaxprs.source_line(self.with_line(eqn))

    def densify(self, lazy: LazyWeight, eqn: Any, why: str = "") -> Any:
        """Materialize a weight for an equation that no rule covers, as `on_dense` says."""
        return self._densify_at(lazy, eqn.primitive.name, self.line(eqn), why)

    def dequantize(self, lazy: LazyWeight, eqn: Any, why: str) -> LazyWeight:
        """Return a weight whose quantized base is an array, its factors as they are."""
        values = base_values(lazy.w)
        self._say_dense(lazy, eqn.primitive.name, self.line(eqn), why, _DEQUANTIZED)
        return dataclasses.replace(lazy, w=values)

    def densify_gain(self, x: Any, eqn: Any) -> Any:
        """Return `x`, materialized where it is a weight with a gain."""
        has_gain = isinstance(x, LazyWeight) and x.gain is not None
        return self.densify(x, eqn, " (its magnitude takes part)") if has_gain else x

    def densify_output(self, lazy: LazyWeight) -> Any:
        """Materialize a weight that the program returns."""
        return self._densify_at(lazy, "return", "the end of the function", "")

    def _densify_at(self, lazy: LazyWeight, primitive: str, line: str, why: str) -> Any:
        if self.uses is not None:
            self.uses += dense_uses(lazy, primitive, line)
            return to_dense(lazy)
        if lazy.differs_by_row:
            raise NoPlaceForRows
        # Rows picked by ids are an activation, and so is one row that a number picks.
        is_row = bool(lazy.origin.indexed) and sum(n > 1 for n in lazy.shape) < 2
        if not lazy.origin.looked_up and not is_row:
            done = _MATERIALIZED if lazy.a is not None or lazy.w is None else _DEQUANTIZED
            self._say_dense(lazy, primitive, line, why, done)
        return to_dense(lazy)

    def _say_dense(
        self, lazy: LazyWeight, primitive: str, line: str, why: str, done: tuple[str, str]
    ) -> None:
        what, mend = done
        message = (
            f"{lazy.origin}: `{primitive}` at {line} needs the whole weight{why}, so "
            f"{what.format(list(lazy.shape))} there. The result is correct, but it takes the "
            f"memory of a dense weight. {mend}, or pass "
            'on_dense="allow" to accept this'
        )
        if self.on_dense == "error":
            raise DenseError(message)
        site = (str(lazy.origin), primitive, line)
        if self.on_dense == "warn" and site not in self._warned:
            self._warned.add(site)
            warnings.warn(message, DenseWarning, stacklevel=2)
