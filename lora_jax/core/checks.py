"""Checks of single values, for every place that validates an argument or a field of a file."""

from numbers import Integral, Real
from typing import Any, TypeGuard


def is_integer(x: Any) -> TypeGuard[int]:
    """Return whether `x` is an integer of Python or numpy, and not a bool.

    >>> is_integer(3), is_integer(True), is_integer(3.0)
    (True, False, False)
    """
    return isinstance(x, Integral) and not isinstance(x, bool)


def is_size(x: Any) -> TypeGuard[int]:
    """Return whether `x` is an integer that an axis can have as its size: from 1 to 2³¹ - 1.

    >>> is_size(8), is_size(0), is_size(True), is_size(2**31)
    (True, False, False, False)
    """
    return is_integer(x) and 0 < x < 2**31


def is_number(x: Any) -> TypeGuard[float]:
    """Return whether `x` is a real number of Python or numpy, and not a bool; NaN is one.

    >>> is_number(3), is_number(0.5), is_number(True), is_number("3")
    (True, True, False, False)
    """
    return isinstance(x, Real) and not isinstance(x, bool)


def is_within(x: Any, low: float, high: float) -> TypeGuard[float]:
    """Return whether `x` is a real number, not NaN, from `low` to `high`.

    >>> is_within(2, 1, 3), is_within(float("nan"), 1, 3), is_within(10**400, 1, 1e9)
    (True, False, False)
    """
    return is_number(x) and bool(low <= x <= high)
