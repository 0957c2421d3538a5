"""The two files of a PEFT adapter: names, configuration and tensors, read without a base."""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from lora_jax.core.errors import AdapterFileError, ConfigError
from lora_jax.files.disk import safetensors_file
from lora_jax.files.disk.required_files import read_required
from lora_jax.files.peft import tensor_names
from lora_jax.files.peft.config import CONFIG, PeftConfig, parse_config
from lora_jax.files.peft.renamed_config import RenamedConfig
from lora_jax.files.torch_adapters.experts import Experts
from lora_jax.files.torch_adapters.factors import TorchFactors
from lora_jax.files.torch_adapters.file_contents import (
    FileContents,
    ImpliedWeight,
    factor_problem,
    missing_factor,
    weight_shape,
)
from lora_jax.files.torch_adapters.rename import renamed

TENSORS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"


@dataclasses.dataclass(frozen=True)
class PeftFile:
    """An adapter directory of PEFT, parsed."""

    directory: Path
    config: PeftConfig
    tensors: dict[str, np.ndarray]
    #: The configuration as the names of `tensors` ask for it, if they are not the file's.
    renamed_config: RenamedConfig | None = None

    @property
    def rules(self) -> PeftConfig:
        """The configuration, asked by the names of `tensors`."""
        return self.renamed_config or self.config

    def rename(self, parts: Mapping[str, str]) -> "PeftFile":
        """Return the file with other names of tensors, see `rename`.

        Raises:
          ConfigError: a part is in no name, or two names become equal.
        """
        new = renamed(self.tensors, parts)
        tensors = {new[name]: x for name, x in self.tensors.items()}
        config = RenamedConfig.of(self.config, new)
        return dataclasses.replace(self, tensors=tensors, renamed_config=config)

    @property
    def source(self) -> Path:
        """The file with the tensors."""
        return self.directory / TENSORS

    def contents(self) -> FileContents:
        """Return what the file contains, without a base."""
        modules, weights, others = self._sort_tensors()
        factors: dict[str, TorchFactors | Experts] = {}
        problems: dict[str, str] = {}
        parameters = _parameter_names(modules, self.rules)
        for wrapper, fields in modules.items():
            module = parameters.get(wrapper, wrapper)
            kind = tensor_names.implied_kind(fields, self.config.fan_in_fan_out)
            found = self._factors(module, kind, fields)
            if isinstance(found, str):
                problems[module] = found
            elif found is not None:
                factors[module] = found
            if isinstance(found, TorchFactors):
                weights[f"{module}.weight"] = kind, weight_shape(kind, found)
            rows = fields.get(tensor_names.ROWS)
            if rows is not None and rows.ndim == 2 and rows.size:
                _, known = weights.get(f"{module}.weight", ("", ()))
                count = max([*known[:1], max(self.rules.rows(module) or (0,)) + 1])
                weights[f"{module}.weight"] = "embedding", (count, rows.shape[1])
        variant = "rsLoRA" if self.config.use_rslora else "LoRA"
        if self.config.changes_base:
            variant += f", {self.config.changes_base}"
        return FileContents(
            variant=f"{variant}, DoRA" if self.config.use_dora else variant,
            base_model=self.config.base_model_name_or_path,
            use_rslora=self.config.use_rslora,
            factors=factors,
            others=others,
            weights=weights,
            problems=problems,
        )

    def _sort_tensors(
        self,
    ) -> tuple[
        dict[str, dict[str, np.ndarray]], dict[str, ImpliedWeight], dict[str, tuple[int, ...]]
    ]:
        """Return the tensors by module and ending, fully trained weights, and all but factors."""
        modules: dict[str, dict[str, np.ndarray]] = {}
        weights: dict[str, ImpliedWeight] = {}
        others: dict[str, tuple[int, ...]] = {}
        known = self._names_saved_whole()
        for name, tensor in self.tensors.items():
            part = tensor_names.part_of_name(name, self.tensors, known)
            if part is not None and part.field == tensor_names.ORIGINAL:
                weights.setdefault(part.module, ("", tensor.shape))
            elif part is not None and part.field:
                modules.setdefault(part.module, {})[part.field] = tensor
            elif part is not None:
                weights[part.module] = "", tensor.shape
            if part is None or part.field not in tensor_names.FACTOR_ENDINGS:
                others[name if part is None else ".".join(filter(None, part))] = tensor.shape
        return modules, weights, others

    def _names_saved_whole(self) -> set[str]:
        """Find the tensors of `modules_to_save`, which may themselves be called "lora_A"."""
        found = set()
        for name in self.tensors:
            inner = name.removeprefix(tensor_names.PREFIX)
            module = "." + inner.rpartition(".")[0]
            if any(module.endswith("." + saved) for saved in self.config.modules_to_save or ()):
                found.add(inner)
        return found

    def _factors(
        self, module: str, kind: str, fields: Mapping[str, np.ndarray]
    ) -> TorchFactors | Experts | str | None:
        """Return a module's factors, None where it has none, or what is wrong with them."""
        if not fields.keys() & tensor_names.FACTOR_ENDINGS:
            return None
        problem = factor_problem(fields, tensor_names.FACTOR_ENDINGS)
        if problem:
            return problem
        if not kind:
            pairs = [tensor_names.endings(kind) for kind in ("linear", "embedding")]
            missing = [missing_factor(fields, *pair) for pair in pairs]
            there = [ending for ending in tensor_names.FACTOR_ENDINGS if ending in fields]
            shapes = " and ".join(f"{ending} {fields[ending].shape}" for ending in there)
            return next(filter(None, missing), f"{shapes} do not fit each other")
        a, b = (fields[ending] for ending in tensor_names.endings(kind))
        total, rank = len(a), self.rules.rank(module)
        is_experts = bool(self.config.target_parameters) and a.ndim == 2 and total % rank == 0
        if is_experts and total > rank:
            # without the base, experts are recognized only by the rank, a multiple of theirs
            return Experts.from_tensors(a, b, rank, self.rules.scale(module, rank))
        return tensor_names.to_factors(kind, fields, self.rules.scale(module, total))


def _parameter_names(modules: Iterable[str], config: PeftConfig) -> dict[str, str]:
    """Return the names of experts' parameters by those of their wrappers, where they are certain.

    The wrappers of one module are nested, the module's first parameter innermost. All experts in
    transformers have their down projection last.
    """
    wrappers: dict[str, list[str]] = {}
    for module in modules:
        wrappers.setdefault(re.sub(r"(\.base_layer)+$", "", module), []).append(module)
    found: dict[str, str] = {}
    for module, nested in wrappers.items():
        if config.targets(module):
            continue
        entries = [entry.rpartition(".") for entry in config.target_parameters or ()]
        named = {leaf for x, _, leaf in entries if x and f".{module}".endswith(f".{x}")}
        leaves = named or {leaf for x, _, leaf in entries if not x}
        ordered = sorted(leaves, key=lambda leaf: ("down" in leaf, leaf))
        if len(ordered) == len(nested):
            inside_out = sorted(nested, key=len, reverse=True)
            found |= {x: f"{module}.{leaf}" for x, leaf in zip(inside_out, ordered, strict=True)}
    return found


def read_file(directory: str | os.PathLike, *, finite: bool = True) -> PeftFile:
    """Read an adapter directory of PEFT.

    Args:
      directory: with `adapter_config.json` and `adapter_model.safetensors`.
      finite: reject NaN and infinite values.

    Raises:
      AdapterFileError: a file is missing or damaged, or the configuration cannot be used.
    """
    files = read_required(directory, [CONFIG, TENSORS], pickled=_PICKLED)
    directory = Path(directory)
    config = _parse(directory / CONFIG, files[CONFIG])
    source = str(directory / TENSORS)
    tensors, _ = safetensors_file.decode(files[TENSORS], source, finite=finite)
    return PeftFile(directory, config, tensors)


def read_config(directory: str | os.PathLike) -> PeftConfig:
    """Return the configuration in a directory's `adapter_config.json`.

    Raises:
      AdapterFileError: there is none, or it cannot be used; keys and values are named.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / CONFIG).write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    ...     read_config(folder).scale("h.0.up")
    2.0
    """
    files = read_required(directory, [CONFIG], pickled=_PICKLED)
    return _parse(Path(directory) / CONFIG, files[CONFIG])


def _parse(path: Path, text: bytes) -> PeftConfig:
    try:
        return parse_config(text)
    except ConfigError as error:
        raise AdapterFileError(f"{path}: {error}") from None
