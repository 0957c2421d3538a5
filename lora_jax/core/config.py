"""`LoraConfig`: what to adapt, and how; only data and its validation."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax.numpy as jnp

from lora_jax.core.checks import is_integer, is_number
from lora_jax.core.errors import ConfigError
from lora_jax.core.option_names import check_options
from lora_jax.core.patterns import Pattern, compile_regex, lookup

ALL_LINEAR = "all-linear"
SCALINGS = ("standard", "rslora")
BIASES = ("none", "all", "adapted")
INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "pissa_fast", "olora", "loftq")
DTYPES = ("float32", "bfloat16", "float16", "float64")


def _check_rank(where: str, rank: Any) -> None:
    if not is_integer(rank) or rank <= 0:
        raise ConfigError(f"{where} must be a positive integer, got {rank!r}")


def _check_alpha(where: str, alpha: Any) -> None:
    if alpha is not None and not (is_number(alpha) and math.isfinite(alpha)):
        raise ConfigError(f"{where} must be a finite number or None (= rank), got {alpha!r}")


def _check_probability(where: str, value: Any) -> None:
    if not is_number(value) or not 0 <= float(value) < 1:
        raise ConfigError(f"{where} must be a probability in [0, 1), got {value!r}")


@dataclasses.dataclass(frozen=True)
class Override:
    """What one pattern of `LoraConfig.overrides` sets instead of the values of `LoraConfig`.

    Args:
      rank: the rank of the matched weights; None keeps `LoraConfig.rank`.
      alpha: their alpha; None keeps `LoraConfig.alpha`. If both are None, alpha = rank.
      layout: one letter per axis, `b` batch, `i` in, `o` out ("ioo" for a kernel
        `[embed, heads, head_dim]`), where neither the program nor the shape decides it.
      rows_axis: the axis along which the rows of `LoraConfig.rows` lie, where the function does not
        look them up: 1 for an output head `[embed, vocabulary]`. Negative axes count from the end.
    """

    rank: int | None = None
    alpha: float | None = None
    layout: str | None = None
    rows_axis: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None:
            _check_rank("overrides: rank", self.rank)
        _check_alpha("overrides: alpha", self.alpha)
        if self.layout is not None and (
            not isinstance(self.layout, str) or not set(self.layout) <= set("bio")
        ):
            raise ConfigError(
                f"overrides: layout must be made of the letters b, i and o, got {self.layout!r}"
            )
        if self.rows_axis is not None and not is_integer(self.rows_axis):
            raise ConfigError(f"overrides: rows_axis must be an integer, got {self.rows_axis!r}")


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What a `LoraConfig` says of one weight; None where it leaves that to the program."""

    rank: int
    scale: float
    layout: str | None
    rows_axis: int | None


def _as_override(key: str, value: Any) -> Override:
    if isinstance(value, Override):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"overrides[{key!r}] must be an Override or a mapping, got {value!r}")
    unknown = set(value) - {field.name for field in dataclasses.fields(Override)}
    if unknown:
        raise ConfigError(f"overrides[{key!r}] has unknown keys {sorted(unknown)}")
    return Override(**value)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which weights get a low-rank update `W + scale * A @ B`, and how A and B are initialized.

    The scale is `alpha / rank` ("standard", https://arxiv.org/abs/2106.09685) or
    `alpha / sqrt(rank)` ("rslora", https://arxiv.org/abs/2312.03732).

    Args:
      rank: inner size of the factors, a positive integer.
      alpha: numerator of the scale; None means alpha = rank, so that the standard scale is 1.
      targets: the weights to adapt. "all-linear" selects every weight that the function contracts
        with an activation (without a function: every kernel with two axes and every convolution
        kernel); of these, one too small for `rank` gets the largest that it can hold, with a
        warning. Any other string is a regex for the whole path. A sequence contains path suffixes
        ("query/kernel") or module names ("query"). A callable gets the path and the leaf.
      exclude: what to leave out of `targets`, in the same forms; it wins over `targets`.
      overrides: pattern -> `Override` (or a dict of its fields). The whole path of the leaf wins,
        then that of its module, then the first key that matches as suffix, module name or regex.
      scaling: "standard" or "rslora".
      init: how A and B are initialized. "kaiming" (A uniform in ±1/√fan_in, B zero), "gaussian" (A
        normal, B zero) and "orthogonal" (A·B zero, but neither factor) leave the base as it is.
        "pissa", "pissa_fast" and "olora" move a part of the weight into A and B, and "loftq" rounds
        the weight to NF4 and fits A and B to what that lost: these *change the base*, see `init`
        and `on_original`. Or a custom initializer, a function
        `(key, w, layout, rank, scale, dtype) -> (w', a, b)`, see `lora_jax.initializers`.
      dora: whether each weight also gets one magnitude per output, so that it means
        `m · V / ‖V‖` with `V = W + scale * A @ B` (https://arxiv.org/abs/2402.09353). The magnitude
        is initialized to ‖V‖, so that the function does not change, except for rounding.
      dropout: probability of dropping an input of the adapter. It takes effect only on parameters
        that went through `lora_jax.with_dropout`.
      train: leaves to train fully (a bias, a norm, a new head), in the same forms as `targets`.
      bias: which biases to train fully too: "none", "all", or "adapted" for those beside an adapted
        kernel. A bias is a leaf named "bias", or named "b" if no product uses it as a kernel.
      layers: which layers of the targets to adapt: their numbers (negative ones count from the
        end), or a slice such as `slice(-4, None)` for the last four; None for all. The number of a
        layer is the first one in the path: 3 in "block_3/attn/query/kernel", "layers/3/kernel" and
        "h.3.kernel". Each stack of layers ("encoder/block_", "decoder/block_") is counted
        separately, and a target without a number is left out. A leaf that stacks the layers of a
        scan has factors for all of them; in layers that are left out, A, B and the scale are zero
        and stay zero.
      layers_pattern: which number of a path counts the layers, if there are several: the name
        before it ("block", "layers", "h"), or a regex with one group for the number, such as
        `r"h(\\d+)_attn"`; None for the first. For stacked layers, a module's name in the path.
      rows: pattern -> numbers of the rows of an embedding that train, such as
        {"embedding": [3, 17]}; of a tied embedding these outputs of the head train too. All other
        rows stay as they are, and the weight gets no low-rank update. The patterns are those of
        `overrides`. The rows lie along the axis that the function looks up. For a weight that it
        does not look up, name the axis in an override:
        `rows={"head": [3]}, overrides={"head": Override(rows_axis=1)}`. If the override names a
        layout but no axis, the rows lie along its in axis.
      dtype: the dtype of A, B and fully trained leaves: float32, bfloat16, float16 or float64.

    Raises:
      ConfigError: the value of a field has no meaning; the message names the field.

    >>> LoraConfig(rank=8, alpha=16, targets=["query", "value"]).scale(rank=8, alpha=16)
    2.0
    """

    rank: int = 8
    alpha: float | None = None
    targets: Pattern = ALL_LINEAR
    exclude: Pattern = ()
    overrides: Mapping[str, Override] = dataclasses.field(default_factory=dict)
    scaling: str = "standard"
    init: str | Callable[..., Any] = "kaiming"
    dora: bool = False
    dropout: float = 0.0
    train: Pattern = ()
    bias: str = "none"
    layers: slice | Sequence[int] | None = None
    layers_pattern: str | None = None
    rows: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    dtype: Any = jnp.float32

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        """Make the object; raise a ConfigError that names the option meant by an unknown one."""
        check_options(fields, [field.name for field in dataclasses.fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        _check_rank("rank", self.rank)
        _check_alpha("alpha", self.alpha)
        for field in ("targets", "exclude", "train"):
            object.__setattr__(self, field, check_pattern(field, getattr(self, field)))
        object.__setattr__(self, "rows", _check_rows(self.rows))
        if not self.targets and not self.train and not self.rows and self.bias != "all":
            raise ConfigError("nothing would train: targets, train and rows are empty")
        if not isinstance(self.overrides, Mapping):
            raise ConfigError(f"overrides must be a mapping, got {self.overrides!r}")
        overrides = {key: _as_override(key, value) for key, value in self.overrides.items()}
        object.__setattr__(self, "overrides", overrides)
        for key in overrides:
            compile_regex("overrides", key)
        for field, known in (("scaling", SCALINGS), ("bias", BIASES)):
            if getattr(self, field) not in known:
                raise ConfigError(f"{field} must be one of {known}, got {getattr(self, field)!r}")
        if not callable(self.init) and self.init not in INITS:
            raise ConfigError(f"init must be one of {INITS} or a function, got {self.init!r}")
        if not isinstance(self.dora, bool):
            raise ConfigError(f"dora must be True or False, got {self.dora!r}")
        _check_probability("dropout", self.dropout)
        object.__setattr__(self, "layers", _check_layers(self.layers))
        _check_layers_pattern(self.layers_pattern, self.layers)
        object.__setattr__(self, "dtype", _check_dtype(self.dtype))

    def __hash__(self) -> int:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields |= {name: tuple(fields[name].items()) for name in ("overrides", "rows")}
        fields |= {"layers": str(self.layers)}  # Python 3.11 cannot hash a slice
        return hash(tuple(fields.values()))

    def scale(self, rank: int, alpha: float | None) -> float:
        """Return `alpha/rank` or `alpha/sqrt(rank)`; an alpha of None stands for `rank`."""
        alpha = rank if alpha is None else alpha
        return alpha / (rank if self.scaling == "standard" else math.sqrt(rank))

    def for_path(self, path: str) -> Chosen:
        """Return the rank, scale, layout and rows' axis that apply to the weight at `path`."""
        found = lookup(self.overrides, path)
        override = found[1] if found else Override()
        rank = self.rank if override.rank is None else override.rank
        alpha = self.alpha if override.alpha is None else override.alpha
        return Chosen(rank, self.scale(rank, alpha), override.layout, override.rows_axis)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values; callables become their names."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values |= {name: _plain(values[name]) for name in ("rank", "alpha", "dropout")}
        values["overrides"] = {
            key: {name: _plain(value) for name, value in dataclasses.asdict(override).items()}
            for key, override in self.overrides.items()
        }
        values["rows"] = {key: list(rows) for key, rows in self.rows.items()}
        values["dtype"] = self.dtype.name
        if isinstance(self.layers, slice):
            values["layers"] = {k: getattr(self.layers, k) for k in ("start", "stop", "step")}
        elif self.layers is not None:
            values["layers"] = list(self.layers)
        for field in ("targets", "exclude", "train", "init"):
            if callable(values[field]):
                values[field] = f"<callable {getattr(values[field], '__qualname__', '?')}>"
            elif not isinstance(values[field], str):
                values[field] = list(values[field])
        return values


def _plain(value: Any) -> Any:
    """Return a numpy number as a Python number, for JSON."""
    return value.item() if hasattr(value, "item") else value


def check_pattern(field: str, pattern: Any) -> Pattern:
    """Return a pattern that selects paths, its entries as a tuple.

    Raises:
      ConfigError: it is not a pattern.
    """
    if callable(pattern):
        return pattern
    if isinstance(pattern, str):
        compile_regex(field, pattern)
        return pattern
    if isinstance(pattern, Sequence | set | frozenset) and all(isinstance(e, str) for e in pattern):
        return tuple(sorted(pattern) if isinstance(pattern, set | frozenset) else pattern)
    raise ConfigError(
        f"{field} must be a regex, a sequence of path suffixes or a callable, got {pattern!r}"
    )


def _check_layers(layers: Any) -> slice | tuple[int, ...] | None:
    if layers is None:
        return None
    if isinstance(layers, slice):
        ends = [layers.start, layers.stop, layers.step]
        if all(end is None or is_integer(end) for end in ends) and layers.step != 0:
            return slice(*(None if end is None else int(end) for end in ends))
        raise ConfigError(
            f"layers must be a slice of integers with a step other than 0, got {layers!r}"
        )
    if not isinstance(layers, Sequence) or not all(map(is_integer, layers)):
        raise ConfigError(f"layers must be a sequence of integers or a slice, got {layers!r}")
    if not layers:
        raise ConfigError("layers is empty, so nothing would be adapted; None selects all layers")
    return tuple(int(number) for number in layers)


def _check_rows(rows: Any) -> dict[str, tuple[int, ...]]:
    if not isinstance(rows, Mapping):
        raise ConfigError(f"rows must be a mapping from patterns to row numbers, got {rows!r}")
    checked = {}
    for key, numbers in rows.items():
        compile_regex("rows", key)
        if isinstance(numbers, str) or not hasattr(numbers, "__iter__"):
            raise ConfigError(f"rows[{key!r}] must be a sequence of row numbers, got {numbers!r}")
        found = tuple(numbers)
        wrong = [number for number in found if not is_integer(number) or number < 0]
        if wrong or not found:
            raise ConfigError(f"rows[{key!r}] must be integers of at least 0, got {wrong or found}")
        twice = sorted({int(number) for number in found if found.count(number) > 1})
        if twice:
            raise ConfigError(f"rows[{key!r}] names rows twice: {twice}")
        checked[key] = tuple(int(number) for number in found)
    return checked


def _check_layers_pattern(pattern: Any, layers: Any) -> None:
    if pattern is None:
        return
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(f"layers_pattern must be a name or a regex, got {pattern!r}")
    if compile_regex("layers_pattern", pattern).groups > 1:
        raise ConfigError(
            f"layers_pattern: {pattern!r} has several groups; only one may match the number"
        )
    if layers is None:
        raise ConfigError(
            "layers_pattern says where the numbers of layers are: it needs layers= too"
        )


def _check_dtype(dtype: Any) -> Any:
    if dtype is None:  # numpy reads None as float64
        raise ConfigError("dtype must be a dtype, got None")
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        raise ConfigError(f"dtype is not a dtype: {dtype!r}") from None
    if dtype.name not in DTYPES:
        raise ConfigError(f"dtype must be one of {DTYPES}, got {dtype}")
    return dtype
