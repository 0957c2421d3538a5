"""A configuration that is asked by the base's names of modules, and answers by the file's."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Self

from lora_jax.files.peft.config import PeftConfig, first_match
from lora_jax.files.peft.tensor_names import PREFIX

#: What follows the module in the name of a tensor.
_AFTER_MODULE = re.compile(r"\.(lora_\w+|token_adapter|base_layer|modules_to_save)(\.|$).*")


@dataclasses.dataclass(frozen=True)
class RenamedConfig(PeftConfig):
    """The configuration of a file whose tensors were renamed; its patterns know the old names."""

    names: Mapping[str, str] = dataclasses.field(default_factory=dict)  # the file's by the base's

    @classmethod
    def of(cls, config: PeftConfig, tensors: Mapping[str, str]) -> Self:
        """Return a configuration for tensors with other names than the file's.

        Args:
          config: the file's.
          tensors: the new names by the file's.
        """
        fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(PeftConfig)}
        return cls(**fields, names={_module(new): _module(old) for old, new in tensors.items()})

    def rank(self, module: str) -> int:
        return super().rank(self._asked(self.rank_pattern, module))

    def scale(self, module: str, rank: int | None = None) -> float:
        rank = self.rank(module) if rank is None else rank
        return super().scale(self._asked(self.alpha_pattern, module), rank)

    def targets(self, module: str, *, last_number: bool = False) -> bool:
        return super().targets(self._in_file(module), last_number=last_number)

    def targets_parameter(self, name: str) -> bool:
        return super().targets_parameter(self._in_file(name))

    def rows(self, module: str) -> tuple[int, ...] | None:
        rows = super().rows(self._in_file(module))
        return super().rows(module) if rows is None else rows

    def _asked(self, patterns: Iterable[str], module: str) -> str:
        """Return the module's name that a pattern knows: the file's, or else the base's."""
        own = self._in_file(module)
        return module if first_match(patterns, own) is None else own

    def _in_file(self, name: str) -> str:
        parent, _, leaf = name.rpartition(".")  # a parameter of experts in its module
        return self.names.get(name) or ".".join([self.names.get(parent, parent), leaf]).strip(".")


def _module(name: str) -> str:
    """Return the module in the name of a tensor, without what the name may have too much."""
    _, prefix, inner = name.partition(PREFIX)
    return _AFTER_MODULE.sub("", inner if prefix else name)
