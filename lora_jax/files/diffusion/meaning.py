"""What one module of a file means: checks of its tensors, its method, and DoRA."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from lora_jax.files.diffusion import methods, of_base
from lora_jax.files.diffusion.weight import Fields, MisfitError, Shape, Weight
from lora_jax.files.diffusion.whole import Whole
from lora_jax.files.torch_adapters.contents import dtype_problem
from lora_jax.files.torch_adapters.factors import TorchFactors


class _Method(NamedTuple):
    """A method: its name, the fields that it needs, those that it may have, and its reader."""

    name: str
    required: frozenset[str]
    optional: frozenset[str]
    read: Callable[[Fields, Weight], TorchFactors | Whole]


#: The fields of DoRA.
DORA = ("dora_scale", "magnitude")
_NUMBERS = ("alpha", "on_input")
_HADAMARD = frozenset(f"hada_w{n}_{x}" for n in (1, 2) for x in "ab")
_KRONECKER = frozenset(f"lokr_w2{x}" for x in ("", "_a", "_b")) | {"lokr_t2"}
_METHODS = (
    _Method("LoRA", frozenset({"down", "up"}), frozenset({"mid", "up_bias"}), methods.lora),
    _Method("LoHa", _HADAMARD, frozenset({"hada_t1", "hada_t2"}), methods.loha),
    _Method("LoKr", frozenset({"lokr_w1"}), _KRONECKER, methods.lokr),
    _Method("LoKr", frozenset({"lokr_w1_a", "lokr_w1_b"}), _KRONECKER, methods.lokr),
    _Method("full", frozenset({"diff"}), frozenset(), methods.whole),
    _Method("IA³", frozenset({"ia3", "on_input"}), frozenset(), of_base.ia3),
    _Method("OFT", frozenset({"oft_blocks"}), frozenset({"rescale"}), of_base.oft),
    _Method("GLoRA", frozenset({"a1", "a2", "b1", "b2"}), frozenset(), of_base.glora),
)


def method_of(fields: Mapping[str, object]) -> str | None:
    """Return the name of the method that a module's fields belong to, or None."""
    return next((x.name for x in _METHODS if x.required <= fields.keys()), None)


def meaning(fields: Fields, weight: Weight) -> TorchFactors | Whole | str:
    """Return the change that a module's tensors mean, or what is wrong with them.

    Args:
      fields: the tensors by field, see `fields`, without those of biases and norms.
      weight: what is known of the weight that they change.

    >>> one = {"down": np.ones((2, 3), "f4"), "up": np.ones((4, 2), "f4"), "alpha": np.array(1.0)}
    >>> meaning(one, Weight((4, 3))).scale, meaning(one, Weight((4, 5)))
    (0.5, "is for a weight of shape (4, 3), but the base's is (4, 5)")
    """
    problem = next((f"{f} {p}" for f, x in fields.items() if (p := _wrong(f, x, fields))), None)
    if problem:
        return problem
    method = next((x for x in _METHODS if x.required <= fields.keys()), None)
    if method is None:
        return f"has only {', '.join(sorted(fields))}, which makes no adapter"
    extra = fields.keys() - method.required - method.optional - {"alpha", *DORA}
    if extra:
        return f"has {', '.join(sorted(extra))} beside {method.name}"
    try:
        found = method.read(fields, weight)
    except MisfitError as misfit:
        return str(misfit)
    return _with_dora(found, fields, weight.shape)


def _wrong(field: str, x: np.ndarray, fields: Fields) -> str | None:
    """Return what is wrong with one tensor by itself, or None."""
    if field in _NUMBERS:
        is_number = np.issubdtype(x.dtype, np.integer) or not dtype_problem(x)
        if x.size != 1 or not is_number or not abs(float(x.reshape(()))) < 1e30:
            return f"is {x.dtype} of shape {x.shape}, not one number below 1e30"
        is_rank = field == "alpha" and "oft_blocks" not in fields  # whose alpha is a limit
        if is_rank and float(x.reshape(())) == 0:
            return "is 0, which trainers take for the rank, and readers for no change"
        return None
    return f"has shape {x.shape}, and is empty" if x.size == 0 else dtype_problem(x)


def _with_dora(
    found: TorchFactors | Whole, fields: Fields, shape: Shape | None
) -> TorchFactors | Whole | str:
    """Return the change with the magnitudes among the fields, by outputs or by inputs."""
    there = [field for field in DORA if field in fields]
    if not there:
        return found
    if len(there) > 1:
        return f"has {' and '.join(there)}"
    x, out = fields[there[0]], found.outputs
    sizes = [size for size in x.shape if size != 1]
    first = x.shape[:1] == (out,) or (there[0] == "magnitude" and x.shape[:2] == (1, out))
    if first and sizes in ([out], []):
        return dataclasses.replace(found, magnitude=x.reshape(-1))
    ins = shape[1] if shape else found.a.shape[1] if isinstance(found, TorchFactors) else x.size
    if there[0] == "magnitude" or x.shape[:2] != (1, ins) or x.size != ins:
        return f"{there[0]} has shape {x.shape}, which is one number neither an output nor an input"
    if isinstance(found, Whole):
        return dataclasses.replace(found, method="DoRA by inputs", column_magnitude=x.reshape(-1))
    update = found.update
    return Whole("DoRA by inputs", out, lambda _: update(), column_magnitude=x.reshape(-1))
