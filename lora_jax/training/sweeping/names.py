"""Names of the runs of a sweep: short, and fit for a directory."""

from collections.abc import Mapping, Sequence
from decimal import Decimal

#: Settings of a run -> what stands before their values in its name.
_SHORT = {
    "rank": "rank",
    "lr": "lr",
    "alpha": "alpha",
    "weight_decay": "decay",
    "dropout": "dropout",
    "seed": "seed",
}
_ALWAYS = ("rank", "lr")

Settings = Mapping[str, float | None]  # by the names of `lora-jax train`; None: the default


def name_runs(runs: Sequence[Settings]) -> list[str]:
    """Return a name for each run: its rank, its rate, and whatever else differs between runs.

    >>> name_runs([{"rank": 4, "lr": 3e-4, "seed": s, "alpha": None} for s in (0, 1)])
    ['rank4-lr3e-4-seed0', 'rank4-lr3e-4-seed1']
    """
    shown = [name for name in _SHORT if name in _ALWAYS or varies(runs, name)]
    return [
        "-".join(f"{_SHORT[name]}{in_short(run[name])}" for name in shown if name in run)
        for run in runs
    ]


def varies(runs: Sequence[Settings], name: str) -> bool:
    """Return whether runs differ in a setting."""
    return len({run.get(name) for run in runs}) > 1


def in_short(value: float | None) -> str:
    """Return a number as a person writes it, with all its digits.

    >>> [in_short(x) for x in (16, 3e-4, 0.05, 1e-05, 0.0015, 2.5, 2.0, 1e6, None)]
    ['16', '3e-4', '0.05', '1e-5', '1.5e-3', '2.5', '2', '1e6', 'default']
    """
    if value is None:
        return "default"
    sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    assert isinstance(exponent, int)
    power = len(digits) - 1 + exponent
    if not value or -2 <= power <= 4:
        return f"{value:f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    mantissa = "".join(map(str, digits))
    rest = f".{mantissa[1:]}" if len(mantissa) > 1 else ""
    return f"{'-' * sign}{mantissa[0]}{rest}e{power}"
