"""`StackIndex`: the names of a stack's adapters and their order, in a file or a directory."""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_jax.adapters.stacks.stack import slots_of, stack, unstack
from lora_jax.core.errors import AdapterFileError, ConfigError, LoraError
from lora_jax.core.foreign import shown, shown_value
from lora_jax.core.tree import adapted_nodes
from lora_jax.core.weights import LoraWeight
from lora_jax.files.disk import strict_json
from lora_jax.files.disk.atomic import read_directory

INDEX = "stack.json"
_MAX_NAME = 128
_MAX_RANK = 2**12  # so that an index asks for no more memory than the base itself takes


@dataclasses.dataclass(frozen=True)
class StackIndex:
    """The names of the adapters in the order of their slots, and the rank of the stack.

    The rank is None where the adapters themselves imply it.
    """

    names: tuple[str, ...]
    rank: int | None = None

    @classmethod
    def of(cls, caller: str, stack: Any, names: Sequence[str] | None) -> "StackIndex":
        """Return the index of a stack; by default its adapters are called by their numbers.

        Raises:
          ConfigError: there is not one name for each adapter, or a name is not that of a file.
        """
        count = slots_of(caller, stack)
        chosen = [str(n) for n in range(count)] if names is None else names
        if isinstance(chosen, str) or len(chosen) != count:
            raise ConfigError(
                f"{caller}: names must be a sequence of {count} names, one for each adapter of the "
                f"stack, got {shown_value(names)}"
            )
        problems = name_problems(chosen)
        if problems:
            raise ConfigError(f"{caller}: names: " + "; ".join(problems))
        return cls(tuple(chosen), _rank_beyond(stack))

    def __str__(self) -> str:
        more = f" and {len(self.names) - 6} more" if len(self.names) > 6 else ""
        return ", ".join(map(shown, self.names[:6])) + more

    def to_json(self) -> str:
        """Return the content of an index file."""
        return json.dumps({"adapters": list(self.names), "rank": self.rank})

    def choose(self, source: str, names: str | Sequence[str] | None) -> tuple[str, ...]:
        """Return the names that are asked for, by default all.

        Raises:
          AdapterFileError: the stack has not all of them.
        """
        if names is None:
            return self.names
        asked = (names,) if isinstance(names, str) else tuple(names)
        if not asked:
            raise AdapterFileError(f"{source}: names is empty; it has {self}")
        missing = [name for name in asked if name not in self.names]
        if missing:
            raise AdapterFileError(
                f"{source}: no adapter {', '.join(map(shown_value, missing))}; it has {self}"
            )
        return asked

    def stack(self, source: object, adapters: Sequence[Any]) -> Any:
        """Return overlays as a stack of this rank.

        Raises:
          AdapterFileError: they do not fit together, or one has a larger rank.
        """
        try:
            return stack(adapters, rank=self.rank)
        except LoraError as error:
            raise AdapterFileError(f"{source}: {error}") from None


def index_of(value: Any, source: str) -> StackIndex:
    """Return the index that a JSON value is.

    Raises:
      AdapterFileError: it is not one.
    """
    keys = {"adapters", "rank"}
    if not isinstance(value, dict) or value.keys() != keys:
        raise AdapterFileError(f"{source}: the index of a stack must have adapters and rank")
    names, rank = value["adapters"], value["rank"]
    if not isinstance(names, list) or not names:
        raise AdapterFileError(f"{source}: adapters must be a list of names")
    problems = name_problems(names)
    if rank is not None and not (type(rank) is int and 0 < rank <= _MAX_RANK):
        problems.append(
            f"rank must be null or a number from 1 to {_MAX_RANK}, not {shown_value(rank)}"
        )
    if problems:
        raise AdapterFileError(f"{source}: the index of a stack: " + "; ".join(problems))
    return StackIndex(tuple(names), rank)


def read(path: Path) -> StackIndex | None:
    """Return the index in a directory, None if there is none.

    Raises:
      AdapterFileError: it is damaged, or the directory cannot be read.
    """
    try:
        found = read_directory(path, [INDEX])
    except OSError as error:
        raise AdapterFileError(f"{path}: cannot be read: {error.strerror}") from None
    if INDEX not in found:
        return None
    source = str(path / INDEX)
    return index_of(strict_json.parse_json(found[INDEX], source), source)


def read_or_list(
    path: Path, names: str | Sequence[str] | None, name_of: Callable[[str], str | None]
) -> StackIndex:
    """Return the index in a directory; without one, that of the adapters in it.

    Args:
      path: the directory.
      names: the adapters that are asked for: without an index they must be named.
      name_of: the name of the adapter that an entry of the directory is, None if it is not one.

    Raises:
      AdapterFileError: there is neither an index nor an adapter, the index is damaged, or it is
        needed because no names are given.
    """
    index = read(path)
    if index is not None:
        return index
    found = sorted(name for entry in os.listdir(path) if (name := name_of(entry)) is not None)
    if not found:
        raise AdapterFileError(f"{path}: a directory without adapters, and without {INDEX}")
    listed = StackIndex(tuple(found))
    if names is None:
        raise AdapterFileError(
            f"{path}: a directory without {INDEX}; say by names= which of its adapters to load, in "
            f"which order: {listed}"
        )
    return listed


def named_adapters(
    caller: str, stack: Any, names: Sequence[str] | None
) -> tuple[StackIndex, dict[str, Any]]:
    """Return the index of a stack, and the tree of each adapter by its name."""
    index = StackIndex.of(caller, stack, names)
    return index, dict(zip(index.names, unstack(stack), strict=True))


def name_problems(names: Sequence[Any]) -> list[str]:
    """Return why names cannot be those of files; empty if they can.

    >>> name_problems(["mine", "../x"])
    ["'../x' is not the name of a file without a path"]
    """
    problems = [
        f"{shown_value(name)} is not the name of a file without a path"
        for name in names
        if not isinstance(name, str)
        or not 0 < len(name) <= _MAX_NAME
        or not name.isprintable()
        or re.search(r'[/\\:*?"<>|]|^[.~ ]|[. ]$', name)
    ]
    if not problems and len({name.lower() for name in names}) < len(names):
        problems.append("two adapters have the same name")
    return problems


def _rank_beyond(stack: Any) -> int | None:
    """Return the rank to which all factors are padded, if none of the adapters has it."""
    nodes = [x for x in adapted_nodes(stack).values() if isinstance(x, LoraWeight)]
    ranks = {node.rank for node in nodes}
    own = [node.slot[..., 0].max() for node in nodes if node.slot is not None]
    is_beyond = len(ranks) == 1 and bool(own) and max(own) < min(ranks) <= _MAX_RANK
    return ranks.pop() if is_beyond else None
