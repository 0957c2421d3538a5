"""Adapters that an option gives a name: `--adapter french=runs/french`."""

from collections.abc import Sequence
from pathlib import Path

from lora_jax.cli.errors import AdapterOptionError
from lora_jax.core.foreign import shown


def named_adapters(base: str, adapters: Sequence[str]) -> dict[str, Path]:
    """Return the paths by name, that of the base, which is empty, before all others.

    Args:
      base: the name of the base.
      adapters: each a name and a path, or a path, whose last part is the name.

    Raises:
      AdapterOptionError: a name or a path is empty, or two have one name.

    >>> named_adapters("tiny", ["law=runs/1", "runs/french"])
    {'tiny': PosixPath('.'), 'law': PosixPath('runs/1'), 'french': PosixPath('runs/french')}
    """
    found = {base: Path()}
    for given in adapters:
        name, equals, path = given.partition("=")
        if not equals or Path(given).exists():
            name, path = Path(given).name, given
        if not name or not path:
            raise AdapterOptionError(f"--adapter {shown(given)}: give a name and a path, NAME=PATH")
        if name in found:
            raise AdapterOptionError(
                f"--adapter {shown(given)}: the name {shown(name)} is already used for "
                f"{found[name] if name != base else 'the base'}; give it another one, NAME=PATH"
            )
        found[name] = Path(path)
    return found
