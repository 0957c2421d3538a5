"""Which argument of a function its parameters are, by `argnum` or `argname`."""

import functools
from collections.abc import Callable
from typing import Any

from lora_jax.core.checks import is_integer
from lora_jax.core.errors import ConfigError


def params_first(
    caller: str, fn: Callable, argnum: Any = 0, argname: str | None = None
) -> Callable:
    """Return `fn` with its parameters as the first argument, whichever argument they are.

    Args:
      caller: the verb, for messages.
      fn: the function.
      argnum: the position of the parameters among its arguments.
      argname: the name of the keyword argument that they are, in place of `argnum`.

    Raises:
      ConfigError: `argnum` is not a position, both are given, or an argument is missing or double.

    >>> params_first("init", lambda x, scale, params: (params, x, scale), 2)("params", "x", 2)
    ('params', 'x', 2)
    """
    if not is_integer(argnum) or argnum < 0:
        raise ConfigError(f"{caller}: argnum must be 0 or a positive integer, got {argnum!r}")
    if argname is not None and argnum:
        raise ConfigError(f"{caller}: give argnum or argname, not both")
    if argname is not None and not isinstance(argname, str):
        raise ConfigError(f"{caller}: argname must be a name, got {argname!r}")
    if argname is None and argnum == 0:
        return fn

    @functools.wraps(fn)
    def call(params: Any, *args: Any, **kwargs: Any) -> Any:
        if argname in kwargs:
            raise ConfigError(
                f"{caller}: argname={argname!r} says that this argument is the parameters; leave "
                "it out of the other ones"
            )
        if argname is not None:
            return fn(*args, **kwargs, **{argname: params})
        if len(args) < argnum:
            raise ConfigError(
                f"{caller}: argnum={argnum}, but {len(args)} other arguments are given. Pass all "
                "of them, in their order, without the parameters"
            )
        return fn(*args[:argnum], params, *args[argnum:], **kwargs)

    return call
