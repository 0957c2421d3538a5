"""PEFT's names and shapes of tensors for each kind of module."""

import math
from collections.abc import Container, Mapping
from typing import NamedTuple

import numpy as np

from lora_jax.files.torch_adapters.factors import TorchFactors

PREFIX = "base_model.model."
ROWS = "token_adapter.trainable_tokens_delta"  # despite its name it contains the rows' values
LORA_BIAS = "lora_B.bias"
MAGNITUDE = "lora_magnitude_vector"
_FACTORS = {"embedding": ("lora_embedding_A", "lora_embedding_B")}
_OTHERS = ("lora_A.weight", "lora_B.weight")
FACTOR_ENDINGS = (*_OTHERS, *_FACTORS["embedding"])
ORIGINAL = "base_layer"  # an untrained copy of a base tensor, saved with resized embeddings
_ENDINGS = (*FACTOR_ENDINGS, LORA_BIAS, MAGNITUDE, ROWS)
_BASE = "base_layer."
#: What PEFT puts before the last name of a tensor that is a copy of a base tensor, or trained.
_COPIES = (".token_adapter.base_layer", ".original_module", ".base_layer")
_TRAINED = ".modules_to_save"


class Part(NamedTuple):
    """What one tensor of a file is."""

    module: str  # the module's name in PyTorch; of a whole tensor or a copy, its whole name
    field: str  # an ending of PEFT's names, ORIGINAL, or "" for a fully trained tensor


def part_of_name(name: str, names: Container[str], known: Container[str]) -> Part | None:
    """Parse the name of a tensor; None if it is not a name of PEFT's.

    A module may itself be called "lora_A", "weight" or "base_layer". So a name that the base has is
    that tensor, unless the other tensors in the file show that it is a factor.

    Args:
      name: the tensor's name.
      names: all names in the file.
      known: the names of the base's tensors.

    >>> part_of_name("base_model.model.h.0.up.lora_A.weight", (), {"h.0.up.weight"})
    Part(module='h.0.up', field='lora_A.weight')
    >>> part_of_name("base_model.model.x.lora_A.weight", (), {"x.lora_A.weight"})
    Part(module='x.lora_A.weight', field='')
    >>> part_of_name("base_model.model.head.modules_to_save.weight", (), {"head.weight"})
    Part(module='head.weight', field='')
    >>> part_of_name("base_model.model.head.original_module.weight", (), {"head.weight"})
    Part(module='head.weight', field='base_layer')
    """
    if not name.startswith(PREFIX):
        return None
    inner = name.removeprefix(PREFIX)
    if inner.endswith(f".{MAGNITUDE}.weight"):  # as in diffusers
        inner = inner.removesuffix(".weight")
    for ending in _ENDINGS:
        module = inner.removesuffix("." + ending)
        if module != inner and (inner not in known or _is_factor(module, names, known)):
            return Part(module, ending)
    return Part(inner, "") if inner in known else _whole_or_copy(inner)


def _whole_or_copy(inner: str) -> Part:
    """Return what a name means that is neither a factor's nor the base's.

    With resized embeddings PEFT saves all tensors of a module in `modules_to_save`: the trained
    ones under two names, and the original ones.
    """
    module, _, leaf = inner.rpartition(".")
    if module.endswith(_TRAINED):
        return Part(f"{module.removesuffix(_TRAINED)}.{leaf}", "")
    for ending in _COPIES:
        own = module.removesuffix(ending)
        if own != module:
            is_trained = ending == ".base_layer" and leaf != "weight"  # of `bias`
            return Part(f"{own}.{leaf}", "" if is_trained else ORIGINAL)
    return Part(inner, "")


def _is_factor(module: str, names: Container[str], known: Container[str]) -> bool:
    """Return whether `module` has both factors in the file, one of them named like a weight."""
    pairs = [f"{PREFIX}{module}.{ending}" for ending in _OTHERS]
    weights = [f"{module}.{ending}" for ending in _OTHERS]
    is_pair = all(pair in names for pair in pairs) and not all(w in known for w in weights)
    return f"{module}.weight" in known and is_pair


def of_whole(name: str, is_wrapped: bool) -> str:
    """Return the name in a file of a tensor that is saved whole.

    Args:
      name: its name in PyTorch.
      is_wrapped: whether its module has factors, so that PEFT wraps it.

    >>> of_whole("h.up.bias", True)
    'base_model.model.h.up.base_layer.bias'
    """
    module, _, leaf = name.rpartition(".")
    return PREFIX + (f"{module}.{_BASE}{leaf}" if is_wrapped else name)


def is_beside_trained(name: str) -> bool:
    """Return whether a copy of a base tensor stands beside the trained one, which replaces it.

    >>> is_beside_trained("base_model.model.head.original_module.weight")
    True
    """
    return ".original_module." in name


def endings(kind: str) -> tuple[str, str]:
    """Return the endings of A's and B's names."""
    return _FACTORS.get(kind, _OTHERS)


def implied_kind(fields: Mapping[str, np.ndarray], fan_in_fan_out: bool) -> str:
    """Return the kind of module that has these factors, or "" if none fits.

    Args:
      fields: its tensors by ending.
      fan_in_fan_out: the configuration's flag, which GPT-2's Conv1D needs.

    >>> implied_kind({"lora_A.weight": np.ones((2, 4)), "lora_B.weight": np.ones((3, 2))}, False)
    'linear'
    """
    for kind, ndims in (("embedding", (2,)), ("conv", (3, 4, 5)), ("linear", (2,))):
        a, b = (fields.get(ending) for ending in endings(kind))
        if a is None or b is None or a.ndim not in ndims or b.ndim != a.ndim:
            continue
        if 0 in (len(a), len(b)):
            continue
        ones = (1,) * (a.ndim - 2)
        if b.shape == (len(b), len(a), *ones):
            return "conv1d" if kind == "linear" and fan_in_fan_out else kind
    return ""


def shapes(kind: str, shape: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's tensors by the endings of their names.

    Args:
      kind: as in a naming's rows.
      shape: of the module's weight in PyTorch.
      rank: of its factors.

    >>> shapes("conv", (8, 6, 3, 5), 4)["lora_A.weight"]
    (4, 6, 3, 5)
    """
    a, b = endings(kind)
    out, ins = outputs(kind, shape)
    ones = (1,) * (len(shape) - 2)
    return {
        a: (rank, *ins),
        b: (out, rank, *ones),
        LORA_BIAS: (out,),
        MAGNITUDE: (1, out, *ones) if kind == "conv" else (out,),
    }


def outputs(kind: str, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Return a module's number of outputs and the sizes of its in axes."""
    return (shape[1], shape[:1]) if kind in ("conv1d", "embedding") else (shape[0], shape[1:])


def to_tensors(module: str, kind: str, factors: TorchFactors) -> dict[str, np.ndarray]:
    """Return a module's factors under PEFT's names and in its shapes."""
    shape = (factors.outputs, *factors.a.shape[1:])  # only the number of axes matters for "conv"
    a, b = endings(kind)
    arrays = {a: factors.a, b: factors.b}
    if factors.magnitude is not None:
        arrays[MAGNITUDE] = factors.magnitude
    if kind == "conv":
        wanted = shapes(kind, shape, factors.rank)
        arrays = {ending: x.reshape(wanted[ending]) for ending, x in arrays.items()}
    return {f"{PREFIX}{module}.{ending}": x for ending, x in arrays.items()}


def to_factors(kind: str, tensors: Mapping[str, np.ndarray], scale: float) -> TorchFactors:
    """Return the factors of tensors by ending, with the shapes that `shapes` returns."""
    a, b = (tensors[ending] for ending in endings(kind))
    magnitude = tensors.get(MAGNITUDE)
    rank = a.shape[0]
    return TorchFactors(
        a,
        b.reshape(math.prod(b.shape) // rank, rank),
        scale,
        None if magnitude is None else magnitude.reshape(-1),
    )
