"""Turn the modules of a file into `Contents`, with every name, shape and dtype checked."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from lora_jax.core.checks import is_integer
from lora_jax.files.diffusion import fields
from lora_jax.files.diffusion.adapter_file import ADDED, REPLACED, DiffusionFile
from lora_jax.files.diffusion.components import component_of, components_of
from lora_jax.files.diffusion.fields import ModuleTensors
from lora_jax.files.diffusion.index import Index, Target
from lora_jax.files.diffusion.meaning import meaning
from lora_jax.files.diffusion.weight import Weight
from lora_jax.files.diffusion.whole import Whole
from lora_jax.files.torch_adapters.contents import Contents, TorchBase, dtype_problem
from lora_jax.files.torch_adapters.factors import TorchFactors, concatenate
from lora_jax.files.torch_adapters.file_contents import missing_factor

#: The kinds of modules that these files adapt.
KINDS = ("linear", "conv")


class Reading:
    """One file, read onto one base: what fits, and what is wrong with the rest."""

    def __init__(
        self,
        file: DiffusionFile,
        model: TorchBase,
        index: Index,
        full_rank: Any,
        components: Collection[str] | None,
    ):
        """Prepare to read; the arguments are those of `load.read_contents`."""
        self._file, self._model, self._index = file, model, index
        self._full_rank, self._components = full_rank, components
        self._sources: dict[str, str] = {}  # of the base's tensors: what the file calls them
        self.found, self.problems = Contents(), list[str]()

    def read(self) -> None:
        """Read every module of the file."""
        with np.errstate(over="ignore", invalid="ignore"):  # `fit_to_base` tells what overflows
            self._read()

    def _read(self) -> None:
        modules, wrong = fields.group(self._file.tensors)
        self.problems += [f"{name}: {problem}" for name, problem in wrong.items()]
        for name, module in modules.items():
            target = self._index.find(name)
            if isinstance(target, Target):
                if self._components is None or component_of(target.modules[0]) in self._components:
                    self._read_module(name, module, target)
            elif self._components is None or not components_of(name).isdisjoint(self._components):
                self.problems.append(f"{name}: {target}")

    def _read_module(self, name: str, module: ModuleTensors, target: Target) -> None:
        tensors, own = dict(module.tensors), dict(module.names)
        weights = [f"{module}.weight" for module in target.modules]
        is_norm = all(x in self._model.index and not self._model.kind(x) for x in weights)
        if is_norm and "diff" in tensors and "w_norm" not in tensors:  # ComfyUI's name of it
            tensors["w_norm"], own["w_norm"] = tensors.pop("diff"), own["diff"]
        for field in [field for field in (*ADDED, REPLACED) if field in tensors]:
            problem = self._add(own[field], tensors.pop(field), field, target)
            self.problems += [f"{own[field]}: {problem}"] if problem else []
        problem = self._read_weight(name, tensors, target) if tensors else None
        self.problems += [f"{name}: {problem}"] if problem else []

    def _add(self, source: str, x: np.ndarray, field: str, target: Target) -> str | None:
        """Add a change of a bias, or of a norm's weight, or that weight; return what is wrong.

        Args:
          source: what the file calls it.
          x: the change or the weight, in the file's order.
          field: see `ADDED` and `REPLACED`.
          target: the module.
        """
        names = [f"{module}.{ADDED.get(field, 'weight')}" for module in target.modules]
        model = self._model
        for name in names:
            if name not in model.index:
                return f"has no place: the base has no {name}"
            if model.kind(name):
                return f"has no place: {name} is not of a norm"
        sizes = [model.shape(name) for name in names]
        total = sum(math.prod(size) for size in sizes)
        if problem := dtype_problem(x):
            return problem
        if x.shape != (total,) or any(len(size) != 1 for size in sizes):
            return f"has shape {x.shape}, but the base needs {(total,)}"
        if field != REPLACED and any(model.value(name) is None for name in names):
            return f"is added to {' and '.join(names)}, so base must contain the values"
        if problem := self._take(source, names):
            return problem
        if field == REPLACED:
            self.found.whole |= self._parts(names, x, target)
        else:
            self._put_change(names, x, target)
        return None

    def _read_weight(
        self, source: str, tensors: dict[str, np.ndarray], target: Target
    ) -> str | None:
        """Read the change of a weight; return what is wrong."""
        names = [f"{module}.weight" for module in target.modules]
        if problem := missing_factor(tensors, "down", "up"):
            return problem
        if wrong := [name for name in names if self._model.kind(name) not in KINDS]:
            return f"{wrong[0]} is not of a linear layer or a convolution"
        first, *others = [self._model.shape(name) for name in names]
        shape = (first[0] + sum(x[0] for x in others), *first[1:])
        bias = tensors.pop("up_bias", None)
        scale = None
        if "alpha" not in tensors and "down" in tensors and tensors["down"].ndim:
            component, _, local = target.modules[0].partition(".")
            scale = self._file.scale(component, local, len(tensors["down"]))
        value = functools.cache(lambda: self._value(names, target))
        meant = meaning(tensors, Weight(shape, scale, value))
        found = self._of_full_rank(meant, names, value) if isinstance(meant, Whole) else meant
        if isinstance(found, str):
            return found
        if bias is not None and (problem := self._add_scaled(source, bias, meant, target)):
            return f"lora_B.bias {problem}"
        if problem := self._take(source, names):
            return problem
        if isinstance(found, TorchFactors):
            self._put_factors(names, found, target)
        else:
            self._put_change(names, found, target)
        return None

    def _add_scaled(
        self, source: str, bias: np.ndarray, meant: TorchFactors | Whole | str, target: Target
    ) -> str | None:
        """Add the bias of PEFT's B, which counts with the scale; return what is wrong."""
        if not isinstance(meant, TorchFactors):
            return "is not read beside DoRA by inputs"
        if problem := dtype_problem(bias):
            return problem
        change = bias.astype("float64") * meant.scale
        return self._add(f"{source}.lora_B.bias", change, "diff_b", target)

    def _value(self, names: list[str], target: Target) -> np.ndarray | None:
        """Return the base's weights, joined in the file's order; None if it lacks some."""
        values = [self._model.value(name) for name in names]
        known = [value for value in values if value is not None]
        if len(known) < len(names):
            return None
        joined = concatenate(known)
        return swap_halves(joined) if target.halves else joined

    def _of_full_rank(
        self, whole: Whole, names: list[str], value: Callable[[], np.ndarray | None]
    ) -> TorchFactors | np.ndarray | str:
        """Return what the caller wants of a change that is not of low rank, or why that fails."""
        rank = self._full_rank
        needs_base = rank == "train" or whole.of_base or whole.column_magnitude is not None
        base = value() if needs_base else None
        if needs_base and base is None:
            return f"{whole.method} needs the values of {', '.join(names)}, which base has not"
        if rank is None:
            return (
                f"{whole.method} is not of low rank here: pass full_rank=16 (--full-rank 16) for "
                'the closest factors of rank 16, or full_rank="train" for a fully trained weight'
            )
        found = whole.closest(rank, base) if is_integer(rank) else whole.change(base)
        assert found is not None, "what it needs is there"
        return found

    def _take(self, source: str, names: list[str]) -> str | None:
        """Note where tensors of the base come from; return the problem if they have a source.

        Args:
          source: what the file calls the module, or a tensor that is added.
          names: of the base's tensors.
        """
        for name in names:
            other = self._sources.setdefault(name, source)
            if other != source:
                return f"is {name}, and so is {other} of this file"
        return None

    def _put_factors(self, names: list[str], found: TorchFactors, target: Target) -> None:
        """Keep the factors of joined modules, each with its own outputs."""
        if target.halves:
            magnitude = None if found.magnitude is None else swap_halves(found.magnitude)
            found = dataclasses.replace(found, b=swap_halves(found.b), magnitude=magnitude)
        stop = 0
        for name in names:
            start, stop = stop, stop + self._model.outputs(name)
            part = found if len(names) == 1 else found.cut(start, stop).drop_unused()
            self.found.factors[name] = part

    def _put_change(self, names: list[str], change: np.ndarray, target: Target) -> None:
        """Keep a change of joined tensors, each with its own outputs."""
        for name, part in self._parts(names, change, target).items():
            self.found.added[name] = part.astype("float64")

    def _parts(self, names: list[str], x: np.ndarray, target: Target) -> dict[str, np.ndarray]:
        """Return the parts of joined tensors by their names in the base."""
        x = swap_halves(x) if target.halves else x
        stops = np.cumsum([self._model.shape(name)[0] for name in names])
        return dict(zip(names, np.split(x, stops[:-1]), strict=True))


def swap_halves(x: np.ndarray) -> np.ndarray:
    """Return the second half along the first axis, then the first.

    >>> swap_halves(np.arange(4)).tolist()
    [2, 3, 0, 1]
    """
    return np.roll(x, len(x) // 2, 0)
