"""Find the modules of a base by what a file calls them: each name is looked up, none is guessed."""

from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from lora_jax.core.patterns import nearest
from lora_jax.files.diffusion.components import (
    component_of,
    dotted,
    spellings,
    underscored,
)
from lora_jax.files.diffusion.originals import originals

_SUGGESTED = 5  # unknown names that are told with the nearest ones
_COMPARED = 200  # names among which those are looked for, which takes time


class Target(NamedTuple):
    """The modules of the base that one module of a file is, joined along their outputs.

    `halves` says that the two halves of the outputs are in the other order in the file.
    """

    modules: tuple[str, ...]
    halves: bool = False


class Index:
    """Every module of a base by every name that a file may have for it."""

    def __init__(self, modules: Iterable[str]):
        """Index modules by name: "unet.mid_block.attentions.0.proj_in"."""
        known = {name: None for name in modules if component_of(name)}
        self.components = dict.fromkeys(x for name in known if (x := component_of(name)))
        self._targets: dict[str, dict[Target, None]] = {}
        for name in known:
            component, _, local = name.partition(".")
            self._add(component, spellings(local), Target((name,)))
            for row in originals(component, local):
                parts = tuple(f"{component}.{part}" for part in row.parts)
                if all(part in known for part in parts):
                    self._add(component, [row.name], Target(parts, row.halves))
        self._suggested = 0

    def _add(self, component: str, names: Iterable[str], target: Target) -> None:
        for alias in aliases(component, names, self.components):
            self._targets.setdefault(alias, {})[target] = None

    def candidates(self, name: str) -> list[Target]:
        """Return all that a file's module may be."""
        return list(self._targets.get(name, ()))

    def look_up(self, name: str) -> Target | None:
        """Return what a file's module is, or None if that is not known or not certain."""
        found = self.candidates(name)
        return found[0] if len(found) == 1 else None

    def find(self, name: str) -> Target | str:
        """Return what a file's module is, or why that is unknown."""
        found = self.candidates(name)
        if len(found) == 1:
            return found[0]
        if found:
            each = " and ".join(" + ".join(target.modules) for target in found)
            return f"is ambiguous: it is the name of {each}"
        self._suggested += 1
        if self._suggested > _SUGGESTED:
            return "not in this base"
        alike = [alias for alias in self._targets if alias[:8] + alias[-6:] == name[:8] + name[-6:]]
        return f"not in this base; {nearest(name, (alike or list(self._targets))[:_COMPARED])}"


def aliases(component: str, names: Iterable[str], among: Collection[str]) -> Iterator[str]:
    """Yield what files call a module with these names, in a pipeline of these components."""
    for i, name in enumerate(names):
        for prefix in dotted(component, among):
            yield f"{prefix}.{name}" if prefix else name
        if not i:  # kohya's names come from those of today
            for prefix in underscored(component, among):
                yield f"{prefix}_{name.replace('.', '_')}"
