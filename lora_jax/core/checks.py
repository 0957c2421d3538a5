"""Checks of single values, for every place that validates an argument or a field of a file."""

from numbers import Integral, Real
from typing import Any, TypeGuard


def is_integer(x: Any) -> TypeGuard[int]:
    """Return whether `x` is an integer of Python or numpy, and not a bool.

    >>> is_integer(3), is_integer(True), is_integer(3.0)
    (True, False, False)
    """
    return isinstance(x, Integral) and not isinstance(x, bool)


def is_number(x: Any) -> TypeGuard[float]:
    """Return whether `x` is a real number of Python or numpy, and not a bool; NaN is one.

    >>> is_number(3), is_number(0.5), is_number(True), is_number("3")
    (True, True, False, False)
    """
    return isinstance(x, Real) and not isinstance(x, bool)
