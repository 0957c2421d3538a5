"""`Naming`: rows that say which tensor of a published file is which leaf of a tree."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from lora_jax.core.checks import is_integer
from lora_jax.core.errors import ConfigError, StructureError, grouped
from lora_jax.core.foreign import shown_value
from lora_jax.files.naming.entry import Entry
from lora_jax.files.naming.patterns import match, placeholders
from lora_jax.files.naming.place import Place


@dataclasses.dataclass(frozen=True)
class Naming:
    """Rows that are tried in order: the first that matches a leaf is used.

    >>> naming = Naming((
    ...     Entry("{*m}.weight", "{*m}/kernel", "linear"),
    ...     Entry("{*m}.bias", "{*m}/bias"),
    ... ))
    >>> place = naming.places({"mlp/up/kernel": (4, 16)})["mlp/up/kernel"]
    >>> place.layers(), place.torch_shape
    ([((), ('mlp.up.weight',))], (16, 4))
    """

    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", tuple(self.entries))

    def with_prefix(self, prefix: str) -> "Naming":
        """Return the same rows with `prefix` before each PyTorch name: "bert.", "model."."""
        add = lambda e: tuple(prefix + name for name in e.torch_names)
        return Naming(
            tuple(
                dataclasses.replace(e, torch=add(e)[0] if isinstance(e.torch, str) else add(e))
                for e in self.entries
            )
        )

    def places(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, "Place"]:
        """Return where each leaf is in PyTorch's files; paths that match no row are left out.

        Args:
          shapes: the shapes of a tree's leaves by path.

        Raises:
          StructureError: leaves do not have the axes of their rows; all are listed.
        """
        found, problems = {}, []
        for path, shape in shapes.items():
            for entry in self._rows_for(path):
                filled = [match(template, path) for template in entry.paths]
                part = next((i for i, x in enumerate(filled) if x is not None), None)
                if part is not None:
                    place = Place(path, tuple(shape), entry, filled[part] or {}, part)
                    problem = place.problem()
                    problems += [problem] if problem else []
                    found[path] = place
                    break
        if problems:
            raise StructureError(
                "the naming does not fit these leaves:\n" + grouped(problems, "leaves")
            )
        return {path: place.among(found) for path, place in found.items()}

    def _rows_for(self, path: str) -> Iterator[Entry]:
        """Yield the rows that may match a path, in order: those with placeholders, and its own."""
        own = self._literal.get(path, ())
        yield from (self.entries[i] for i in sorted({*self._patterns, *own}))

    @functools.cached_property
    def _patterns(self) -> tuple[int, ...]:
        """The numbers of the rows whose paths have placeholders."""
        rows = enumerate(self.entries)
        return tuple(i for i, row in rows if any(placeholders(path) for path in row.paths))

    @functools.cached_property
    def _literal(self) -> dict[str, list[int]]:
        """The numbers of the other rows, by path: a model may have thousands of them."""
        found: dict[str, list[int]] = {}
        for i in {*range(len(self.entries))} - {*self._patterns}:
            for path in self.entries[i].paths:
                found.setdefault(path, []).append(i)
        return found

    def to_json(self) -> list[dict[str, Any]]:
        """Return the rows as JSON values, without fields that have their defaults."""
        blank = Entry("x", "x")
        fields = [field.name for field in dataclasses.fields(Entry)]
        return [
            {f: getattr(e, f) for f in fields if getattr(e, f) != getattr(blank, f)}
            for e in self.entries
        ]

    @classmethod
    def from_json(cls, rows: Any) -> "Naming":
        """Return the naming of `to_json`'s rows.

        Raises:
          ConfigError: it is not a list of objects with `Entry`'s fields; the message names the row.
        """
        if not isinstance(rows, list) or not rows:
            raise ConfigError("a naming must be a list of objects with torch, path, kind, ...")
        fields = {field.name for field in dataclasses.fields(Entry)}
        for i, row in enumerate(rows):
            if not isinstance(row, dict) or not {"torch", "path"} <= row.keys() <= fields:
                raise ConfigError(
                    f"row {i} of the naming: {shown_value(row)} must be an object with torch, "
                    f"path, and optionally {', '.join(sorted(fields - {'torch', 'path'}))}"
                )
            for field, kind in _JSON_TYPES.items():
                if field in row and not _is_json(row[field], kind):
                    raise ConfigError(
                        f"row {i} of the naming: invalid {field} {shown_value(row[field])}"
                    )
        return cls(tuple(Entry(**row) for row in rows))


_JSON_TYPES = {"torch": "names", "path": "names", "kind": "str", "axes": "str"} | {
    "sizes": "sizes",
    "split": "ints",
    "first": "int",
}


def _is_json(value: Any, kind: str) -> bool:
    is_int = lambda x: is_integer(x) and x > 0
    if kind == "sizes":
        return isinstance(value, dict) and all(map(is_int, value.values()))
    if kind == "int":
        return is_integer(value) and value >= 0
    if kind == "ints":
        return isinstance(value, list) and all(map(is_int, value))
    if kind == "names" and isinstance(value, list):
        return bool(value) and all(isinstance(x, str) for x in value)
    return isinstance(value, str)
