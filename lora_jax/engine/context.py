"""What one walk through a program carries along: policy, warnings given, uses seen."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from lora_jax.core.errors import DenseError, DenseWarning
from lora_jax.engine import jaxprs
from lora_jax.engine.arithmetic import to_dense
from lora_jax.engine.forms import PLAIN, Forms
from lora_jax.engine.lazy_weight import Axis, LazyWeight
from lora_jax.engine.products import Hidden
from lora_jax.engine.remat import SUM
from lora_jax.engine.uses import Use, dense_uses, uses_of

#: What `on_dense` may say: warn once a site, refuse, or make dense without a word.
POLICIES = ("warn", "error", "allow")


class Context:
    """The state of one walk; `uses` is a list while uses are inferred, else None.

    `rules` are the user's own, by the name of the primitive.
    """

    def __init__(
        self,
        on_dense: str = "warn",
        uses: list[Use] | None = None,
        rules: Mapping[str, Any] | None = None,
        forms: Forms = PLAIN,
    ):
        self.on_dense = on_dense
        self.uses = uses
        self.rules = rules or {}
        self.forms = forms
        self.jitted: dict[Any, Any] = {}
        self.hidden: dict[int, Hidden] = {}  # id of an equation -> its x·A, had with another's
        self.rematerialised = False  # whether the walk is inside a `remat`
        self.enclosing: Any = None  # the innermost equation around this one that has a source line
        self.in_derivative = False  # whether it is inside an author's rule for tangents
        self._sites = 0
        self._told: set[tuple[str, str, str]] = set()

    @property
    def infers(self) -> bool:
        """Whether this walk only watches how weights are used."""
        return self.uses is not None

    def named(self, total: jax.Array) -> jax.Array:
        """The sum of an adapted product, under its name where a `remat` policy may look for it."""
        # Elsewhere no name: JAX cannot transpose one, and a linear function may be transposed.
        named = self.rematerialised and not self.in_derivative
        return checkpoint_name(total, SUM) if named else total

    @contextlib.contextmanager
    def derivative(self) -> Iterator[None]:
        """Inside it the walk is through an author's rule, in which tangents are transposed."""
        before, self.in_derivative = self.in_derivative, True
        yield
        self.in_derivative = before

    def next_site(self) -> int:
        """A number that no other contraction of this walk has."""
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
            # Where a part of an axis is summed and a part is not, the sum decides.
            kinds.update({o: kind for o in axis.origins if kinds.get(o) != "i"})
        # An axis that is gone was indexed away, or had size one and was squeezed.
        kinds = (
            dict.fromkeys(range(lazy.origin.ndim), "o")
            | dict.fromkeys(lazy.origin.indexed, "b")
            | kinds
        )
        name, line = eqn.primitive.name, self.line(eqn)
        if lazy.origin.looked_up and not {"i", "o"} <= set(kinds.values()):
            # Rows were looked up, then contracted whole: `embedding[ids] @ matrix`.
            self.uses += dense_uses(lazy, name, line)
        else:
            self.uses += uses_of(lazy, name, line, kinds, is_operand or lazy.origin.altered)

    def line(self, eqn: Any) -> str:
        """The user's line that made `eqn`; of one that JAX made itself, the line around it."""
        line = jaxprs.source_line(eqn)
        return line if line or self.enclosing is None else jaxprs.source_line(self.enclosing)

    def make_dense(self, lazy: LazyWeight, eqn: Any, why: str = "") -> Any:
        """The dense form of a weight that no rule covers, after saying so."""
        return self._dense_at(lazy, eqn.primitive.name, self.line(eqn), why)

    def undirected(self, x: Any, eqn: Any) -> Any:
        """The same value, made dense where it is a weight with a gain."""
        has_gain = isinstance(x, LazyWeight) and x.gain is not None
        return self.make_dense(x, eqn, " (its magnitude takes part)") if has_gain else x

    def returned(self, lazy: LazyWeight) -> Any:
        """The dense form of a weight that the program returns."""
        return self._dense_at(lazy, "return", "the end of the function", "")

    def _dense_at(self, lazy: LazyWeight, primitive: str, line: str, why: str) -> Any:
        if self.uses is not None:
            self.uses += dense_uses(lazy, primitive, line)
            return to_dense(lazy)
        if lazy.origin.looked_up:  # rows picked by ids are an activation
            return to_dense(lazy)
        message = (
            f"{lazy.origin}: `{primitive}` at {line} needs the whole weight{why}, so W + scale·A·B "
            f"{list(lazy.shape)} is made dense there. The result is right, but it costs memory; "
            'leave the weight out with exclude=, or pass on_dense="allow" to accept it'
        )
        if self.on_dense == "error":
            raise DenseError(message)
        site = (str(lazy.origin), primitive, line)
        if self.on_dense == "warn" and site not in self._told:
            self._told.add(site)
            warnings.warn(message, DenseWarning, stacklevel=2)
        return to_dense(lazy)
