"""What one equation does with the rows of a batch: one row of a table per kind of primitive."""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

from lora_jax.engine import jaxprs
from lora_jax.engine.rows.orders import Index, Order
from lora_jax.engine.rows.places import Place


@dataclasses.dataclass(frozen=True)
class Fact:
    """What is known of a value of the program."""

    mixed: str | None = None  # what mixed rows on the way to it, as the start of a sentence
    inner: int = 1  # [rows, inner] are one axis: how many entries of it a row has
    number: bool = False  # it is the row's number, or has it in the `columns` of its last axis
    columns: frozenset[int] | None = None  # None: in all
    beyond: bool = False  # it is the row's number plus the number of rows
    adapted: bool = False  # it depends on adapters
    drawn: str | None = None  # what drew random numbers of all rows from one key, as a sentence
    # What is known although rows are mixed; lost where several values may be meant.
    index: Index | None = None  # of integers: which they are
    order: Order | None = None  # the entries of its axis of rows, each its own row's, are in it
    group: Any = None  # it has numbers of groups, none below 0: which, for comparison by identity
    counts: Any = None  # how many entries each group has, of numbers of groups that are these

    @staticmethod
    def join(*facts: "Fact") -> "Fact":
        """Return what is known of a value that is one of several."""
        first = facts[0]
        return Fact(
            next((x.mixed for x in facts if x.mixed), None),
            first.inner,
            all(x.number and x.columns == first.columns for x in facts),
            first.columns,
            all(x.beyond for x in facts),
            any(x.adapted for x in facts),
            next((x.drawn for x in facts if x.drawn), None),
        )

    def mixed_by(self, where: str | None) -> "Fact":
        """Return the fact of a value that depends on what `where` mixed, if it is not None."""
        return dataclasses.replace(self, mixed=self.mixed or where)

    def has_number(self, column: int) -> bool:
        """Return whether a column of the last axis is the row's number."""
        return self.number and (self.columns is None or column in self.columns)


#: What an equation does to the rows: the verb of a sentence about it, or None if it keeps them.
Verdict = str | None
Rule = Callable[["Wide", Any, Sequence[Fact]], Verdict]

MIXES: dict[str, Rule] = {}
MIX = "mixes the rows of the batch"
MEND = (
    "A row's output would depend on the other rows' adapters. Return one value per row, and "
    "compute what mixes them (a mean of their losses) outside of the function; where rows do not "
    "meet, say so by a jax.vmap over them"
)
DRAWN = (
    "draws the random numbers of all rows from one key, and here every row is computed alone, so "
    "all would draw the same. Pass a key per row, [rows], and draw by a jax.vmap over them"
)
PART = "takes some of the rows, which mixes the rows"


def _rule(*primitives: str) -> Callable[[Rule], Rule]:
    def register(fn: Rule) -> Rule:
        MIXES.update(dict.fromkeys(primitives, fn))
        return fn

    return register


@dataclasses.dataclass(frozen=True)
class Wide:
    """The number of rows that a program was traced with: `prime` times those of the batch."""

    prime: int
    rows: int

    @property
    def total(self) -> int:
        """The number of rows in the program."""
        return self.prime * self.rows

    def axes(self, atom: Any) -> list[int]:
        """Return the axes that are axes of rows, or have them merged into them."""
        shape = getattr(atom.aval, "shape", ())
        return [i for i, size in enumerate(shape) if size and size % self.prime == 0]

    def place(self, atom: Any, fact: Fact) -> Place | None:
        """Return where a value has its rows; None where it has none, or more than one axis."""
        axes = self.axes(atom)
        if len(axes) != 1:
            return None
        return Place(axes[0], 1 if atom.aval.shape[axes[0]] == self.total else fact.inner)

    def facts(self, eqn: Any, before: Sequence[Fact], line: str) -> list[Fact]:
        """Return what is known of the outputs of an equation, which is on this line."""
        where = next((x.mixed for x in before if x.mixed), None)
        adapted = any(x.adapted for x in before)
        drawn = next((x.drawn for x in before if x.drawn), None)
        if eqn.primitive.name == "random_bits" and not self.axes(eqn.invars[0]):
            drawn = f"`random_bits` at {line} {DRAWN}" if self.axes(eqn.outvars[0]) else drawn
        carriers = [x for x, v in zip(before, eqn.invars, strict=True) if self.axes(v)]
        name = eqn.primitive.name
        found = []
        for out in eqn.outvars:
            verdict = None
            if math.prod(getattr(out.aval, "shape", ())):
                rule = MIXES.get(name)
                verdict = (rule and rule(self, eqn, before)) or self._plain(eqn, out, before)
            here = verdict and f"`{name}` at {line} {verdict}. {MEND}"
            inner = self._inner(eqn, carriers)
            fact = _row_numbers(self, eqn, before)
            found.append(
                dataclasses.replace(
                    fact, mixed=where or here, inner=inner, adapted=adapted, drawn=drawn
                )
            )
        return found

    def _plain(self, eqn: Any, out: Any, before: Sequence[Fact]) -> Verdict:
        """Return what any equation does to the rows, judged by its shapes."""
        carriers = [v for v in eqn.invars if self.axes(v)]
        axes = self.axes(out)
        if not carriers:
            return None
        if not axes:
            return MIX
        if len(axes) > 1 and all(len(self.axes(v)) < len(axes) for v in carriers):
            return "pairs rows of the batch with each other, which mixes the rows"
        if any(out.aval.shape[i] % self.total for i in axes):
            return PART
        pairs = zip(eqn.invars, before, strict=True)
        alike = {x.inner for v, x in pairs if v in carriers and v.aval.shape == out.aval.shape}
        return MIX if len(alike) > 1 else None

    def _inner(self, eqn: Any, carriers: Sequence[Fact]) -> int:
        if eqn.primitive.name == "reshape" and carriers:
            return _reshaped_inner(self, eqn, carriers[0].inner) or 1
        return next((x.inner for x in carriers if x.inner > 1), 1)

    def whole(self, fact: Fact, *bounds: int) -> bool:
        """Return whether bounds along an axis of rows cut between whole batches."""
        return all(n % (self.total * fact.inner) == 0 for n in bounds)


# --- along one axis, or over some -----------------------------------------------------------------


def _along(parameter: str) -> Rule:
    """Return the rule of what keeps its operand's shape, and mixes along the axes that it names."""

    def rule(wide: Wide, eqn: Any, before: Sequence[Fact]) -> Verdict:
        along = eqn.params[parameter]
        along = along if isinstance(along, Sequence) else [along]
        return MIX if any(i in wide.axes(v) for v in eqn.invars for i in along) else None

    return rule


_PARAMETERS = {
    "dimension": ("sort",),
    "axis": ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "top_k"),
    "dimensions": ("rev", "reduce"),
    "reduction_dimension": ("approx_top_k",),
    "axes": (
        *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"),
        *("reduce_xor", "argmax", "argmin"),
    ),
}
for _parameter, _names in _PARAMETERS.items():
    _rule(*_names)(_along(_parameter))


@_rule(
    "cholesky", "lu", "qr", "eigh", "svd", "eig", "triangular_solve", "schur", "householder_product"
)
def _on_matrices(wide: Wide, eqn: Any, before: Sequence[Fact]) -> Verdict:
    last = [i >= v.aval.ndim - 2 for v in eqn.invars for i in wide.axes(v)]
    return MIX if any(last) else None


@_rule("fft")
def _fft(wide: Wide, eqn: Any, before: Sequence[Fact]) -> Verdict:
    (x,) = eqn.invars
    first = x.aval.ndim - len(eqn.params["fft_lengths"])
    return MIX if any(i >= first for i in wide.axes(x)) else None


@_rule("dot_general")
def _dot_general(wide: Wide, eqn: Any, before: Sequence[Fact]) -> Verdict:
    summed, _ = eqn.params["dimension_numbers"]
    pairs = zip(eqn.invars, summed, strict=True)
    return MIX if any(i in wide.axes(v) for v, dims in pairs for i in dims) else None


@_rule("ragged_dot_general")
def _ragged_dot(wide: Wide, eqn: Any, before: Sequence[Fact]) -> Verdict:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (x_summed, w_summed), _ = numbers.dot_dimension_numbers
    meet = (
        {*x_summed, *numbers.lhs_ragged_dimensions},
        {*w_summed, *numbers.rhs_group_dimensions},
        {eqn.invars[2].aval.ndim - 1},
    )
    pairs = zip(eqn.invars, meet, strict=True)
    return MIX if any(dims & {*wide.axes(v)} for v, dims in pairs) else None


@_rule("conv_general_dilated")
def _conv(wide: Wide, eqn: Any, before: Sequence[Fact]) -> Verdict:
    numbers = eqn.params["dimension_numbers"]
    image, kernel = eqn.invars
    if wide.axes(kernel):  # `jax.vmap` over kernels has them as output features, in groups
        groups = eqn.params["feature_group_count"] * eqn.params["batch_group_count"]
        apart = not wide.axes(image) or groups % wide.total == 0
        return None if wide.axes(kernel) == [numbers.rhs_spec[0]] and apart else MIX
    elsewhere = [i for i in wide.axes(image) if i != numbers.lhs_spec[0]]
    groups = eqn.params["batch_group_count"]  # [groups, images] are one axis
    whole = wide.whole(before[0], image.aval.shape[numbers.lhs_spec[0]] // groups)
    return MIX if elsewhere or (groups > 1 and wide.axes(image) and not whole) else None


def _windows(wide: Wide, eqn: Any, before: Sequence[Fact]) -> Verdict:
    sizes = eqn.params["window_dimensions"]
    return MIX if any(sizes[i] > 1 for v in eqn.invars[:1] for i in wide.axes(v)) else None


_rule(
    *("reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min"),
    *("select_and_scatter_add", "select_and_gather_add"),
)(_windows)


# --- parts, and what is joined --------------------------------------------------------------------


@_rule("slice")
def _slice(wide: Wide, eqn: Any, before: Sequence[Fact]) -> Verdict:
    (x,), params = eqn.invars, eqn.params
    for i in wide.axes(x):
        bounds = params["start_indices"][i], params["limit_indices"][i]
        stride = params["strides"][i] if params["strides"] else 1
        if bounds != (0, x.aval.shape[i]) and not wide.whole(before[0], *bounds):
            return PART
        if stride != 1:
            return PART
    return None


@_rule("split", "unstack")
def _split(wide: Wide, eqn: Any, before: Sequence[Fact]) -> Verdict:
    if eqn.params["axis"] not in wide.axes(eqn.invars[0]):
        return None
    return None if wide.whole(before[0], *eqn.params.get("sizes", (1,))) else PART


@_rule("dynamic_slice")
def _dynamic_slice(wide: Wide, eqn: Any, before: Sequence[Fact]) -> Verdict:
    x, sizes = eqn.invars[0], eqn.params["slice_sizes"]
    return PART if any(sizes[i] != x.aval.shape[i] for i in wide.axes(x)) else None


@_rule("dynamic_update_slice")
def _dynamic_update_slice(wide: Wide, eqn: Any, before: Sequence[Fact]) -> Verdict:
    x, new = eqn.invars[:2]
    fits = all(new.aval.shape[i] == x.aval.shape[i] for i in wide.axes(x))
    return None if fits else "changes some of the rows, which mixes the rows"


@_rule("pad")
def _pad(wide: Wide, eqn: Any, before: Sequence[Fact]) -> Verdict:
    config = eqn.params["padding_config"]
    moved = any(tuple(config[i]) != (0, 0, 0) for i in wide.axes(eqn.invars[0]))
    return MIX if moved else None


@_rule("concatenate")
def _concatenate(wide: Wide, eqn: Any, before: Sequence[Fact]) -> Verdict:
    at = eqn.params["dimension"]
    along = [at in wide.axes(v) for v in eqn.invars]
    alike = len({x.inner for x in before}) == 1
    return MIX if any(along) and not (all(along) and alike) else None


@_rule("reshape")
def _reshape(wide: Wide, eqn: Any, before: Sequence[Fact]) -> Verdict:
    if not wide.axes(eqn.invars[0]):
        return None
    if _reshaped_inner(wide, eqn, before[0].inner) is not None:
        return None
    return "divides the axis of rows, which mixes the rows"


def _reshaped_inner(wide: Wide, eqn: Any, inner: int) -> int | None:
    """Return how many entries a row has of the axis that the rows are in; None if it is divided."""
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    axes = wide.axes(eqn.invars[0])
    if len(axes) != 1:
        return 1
    order = list(eqn.params["dimensions"] or range(len(old)))  # in which the axes are read
    behind_rows = order[order.index(axes[0]) + 1 :]
    stride = math.prod(old[i] for i in behind_rows) * inner  # in the flat array, from row to row
    behind = 1
    for size in reversed(new):
        if size % wide.total == 0:
            fits = stride % behind == 0 and size % (wide.total * stride // behind) == 0
            return stride // behind if fits else None
        behind *= size
    return None


# --- indexing -------------------------------------------------------------------------------------


@_rule("gather")
def _gather(wide: Wide, eqn: Any, before: Sequence[Fact]) -> Verdict:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    paired = numbers.operand_batching_dims
    return _indexes_rows(
        wide, eqn, before[1], numbers.start_index_map, paired, lambda i, n: sizes[i] != n
    )


@_rule(
    "scatter",
    "scatter-add",
    "scatter-mul",
    "scatter-min",
    "scatter-max",
    "scatter_add",
    "scatter_mul",
    "scatter_min",
    "scatter_max",
)
def _scatter(wide: Wide, eqn: Any, before: Sequence[Fact]) -> Verdict:
    numbers = eqn.params["dimension_numbers"]
    if not wide.axes(eqn.invars[0]) and any(wide.axes(v) for v in eqn.invars):
        return MIX
    inserted = {*numbers.inserted_window_dims}
    columns, paired = numbers.scatter_dims_to_operand_dims, numbers.operand_batching_dims
    window = iter(numbers.update_window_dims)
    updates = eqn.invars[2].aval.shape
    kept = [i for i in range(eqn.invars[0].aval.ndim) if i not in inserted and i not in paired]
    size = {i: updates[next(window)] for i in kept}
    return _indexes_rows(wide, eqn, before[1], columns, paired, lambda i, n: size.get(i, 1) != n)


def _indexes_rows(
    wide: Wide,
    eqn: Any,
    ids: Fact,
    columns: Sequence[int],
    paired: Collection[int],
    is_part: Callable[[int, int], bool],
) -> Verdict:
    """Return the verdict on indexing: rows may be indexed by their own numbers alone."""
    for i in wide.axes(eqn.invars[0]):
        if i in paired or not is_part(i, eqn.invars[0].aval.shape[i]):
            continue
        if i not in columns or not ids.has_number(list(columns).index(i)):
            return "indexes the rows, which mixes the rows"
    return None


_SAME = {"broadcast_in_dim", "convert_element_type", "copy", "copy_p", "reshape", "squeeze"}
_SAME |= {"expand_dims", "stop_gradient", "transpose", "optimization_barrier", "name"}


def _row_numbers(wide: Wide, eqn: Any, before: Sequence[Fact]) -> Fact:
    """Return whether the output is the number of its row, and in which columns."""
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    first = before[0] if before else Fact()
    if name == "iota":
        dimension = eqn.params["dimension"]
        return Fact(number=out.shape[dimension] == wide.total)
    if name in _SAME and first.number:
        same = out.shape == eqn.invars[0].aval.shape
        return Fact(number=same or first.columns is None, columns=first.columns)
    if name == "add" and first.number and not jaxprs.is_var(eqn.invars[1]):
        return Fact(beyond=bool(eqn.invars[1].val == wide.total))
    if name == "select_n" and first is not before[-1] and before[1].number and before[-1].beyond:
        return Fact(number=True, columns=before[1].columns)  # where(i < 0, i + rows, i)
    if name == "concatenate" and eqn.params["dimension"] == len(out.shape) - 1:
        start, columns = 0, set()
        for v, fact in zip(eqn.invars, before, strict=True):
            size = v.aval.shape[-1]
            columns |= {start + i for i in range(size) if fact.has_number(i)}
            start += size
        return Fact(number=bool(columns), columns=frozenset(columns))
    return Fact()
