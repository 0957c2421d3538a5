"""Adapters that an option gives a name: `--adapter french=runs/french`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_jax.cli.errors import AdapterOptionError
from lora_jax.cli.options import BASE
from lora_jax.core.foreign import shown
from lora_jax.files import several


@dataclass(frozen=True)
class Chosen:
    """An adapter that an option names; without a path it is the base alone."""

    name: str
    path: Path | None


def chosen_adapters(adapters: Sequence[str] | None) -> list[Chosen]:
    """Return what an option names, in its order: the base for `base`, and for no option at all.

    Args:
      adapters: each a name and a path, or a path, which is the name too. A stack's file or
        directory and a sweep's stand for all adapters in them.

    Raises:
      AdapterOptionError: a name or a path is empty, or two different adapters have one name.

    >>> chosen_adapters(["law=runs/1", "base"])
    [Chosen(name='law', path=PosixPath('runs/1')), Chosen(name='base', path=None)]
    """
    found: dict[str, Path | None] = {}
    chosen = []
    for given in adapters or [BASE]:
        if given == BASE and not Path(given).exists():
            every: list[tuple[str, Path | None]] = [(BASE, None)]
        else:
            every = [(name or str(path), path) for name, _, path in _read(given)]
        for name, path in every:
            if found.setdefault(name, path) != path:
                raise AdapterOptionError(_twice(given, name, found[name]))
            chosen.append(Chosen(name, path))
    return chosen


def named_adapters(base: str, adapters: Sequence[str]) -> dict[str, Path]:
    """Return the paths by name, that of the base, which is empty, before all others.

    Args:
      base: the name of the base.
      adapters: as in `chosen_adapters`, but the last part of a path alone is its name.

    Raises:
      AdapterOptionError: a name or a path is empty, or two have one name.

    >>> named_adapters("tiny", ["law=runs/1", "runs/french"])
    {'tiny': PosixPath('.'), 'law': PosixPath('runs/1'), 'french': PosixPath('runs/french')}
    """
    found = {base: Path()}
    for given in adapters:
        for name, last, path in _read(given):
            name = name or last
            if not name:
                raise AdapterOptionError(_nameless(given))
            if name in found:
                raise AdapterOptionError(_twice(given, name, found[name] if name != base else None))
            found[name] = path
    return found


def _read(given: str) -> Iterator[tuple[str, str, Path]]:
    """Yield the name that was given to each adapter, or "", the last part of its path, and that."""
    name, equals, path = given.partition("=")
    if not equals or Path(given).exists():
        name, path = "", given
    if not path or (path != given and not name):
        raise AdapterOptionError(_nameless(given))
    members = several.adapters_at(Path(path))
    if not members:
        yield name, Path(path).name, Path(path)
    for member, place in members.items():
        yield name and f"{name}/{member}", member, place


def _nameless(given: str) -> str:
    return f"--adapter {shown(given)}: give a name and a path, NAME=PATH"


def _twice(given: str, name: str, path: Path | None) -> str:
    return (
        f"--adapter {shown(given)}: the name {shown(name)} is already used for "
        f"{'the base' if path is None else path}; give it another one, NAME=PATH"
    )
