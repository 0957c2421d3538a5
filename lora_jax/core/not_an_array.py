"""What adapted and quantized weights answer to a function that takes them for arrays."""

from typing import Any, NoReturn

from lora_jax.core.errors import StructureError

_OPERATORS = (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "matmul", "rmatmul", "pow", "rpow"),
    *("truediv", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod", "neg", "pos", "abs"),
    *("lt", "le", "gt", "ge", "getitem", "float", "int", "array", "jax_array"),
)
_ATTRIBUTES = (
    *("T", "mT", "at", "ndim", "size", "astype", "reshape", "transpose", "swapaxes", "ravel"),
    *("dot", "sum", "mean", "max", "min", "take", "squeeze", "flatten", "copy", "view"),
)


class NotAnArray:
    """A parent of what stands for a weight, for which arithmetic is an error that says what to do.

    Attributes:
      what: what it is, in a few words.
      to_arrays: the name of the function that makes plain arrays of it.
    """

    __array_ufunc__ = None  # numpy leaves the operation to the weight
    what, to_arrays = "an adapted weight", "merge"

    def __getattr__(self, name: str) -> Any:
        if name in _ATTRIBUTES:
            raise AttributeError(_message(self), name=name, obj=self)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _message(node: Any) -> str:
    return (
        f"{node!r} is {node.what}, and this function takes it for an array. Transform the "
        "function, lora_jax.lora(fn)(params, ...), or make plain arrays of the weights with "
        f"lora_jax.{node.to_arrays}(params)"
    )


def _refuse(self: Any, *_: Any, **__: Any) -> NoReturn:
    raise StructureError(_message(self))


for _name in _OPERATORS:
    setattr(NotAnArray, f"__{_name}__", _refuse)
