"""`--config FILE.yaml`: a command's options in a file, under their names without dashes.

A value in the file is read as the same text on the command line would be, so both are checked by
the same rules; the command line overrides the file.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_jax.cli.foreign_options import advice
from lora_jax.cli.parameters.groups import in_output
from lora_jax.cli.usage import describe_value
from lora_jax.core.foreign import shown

_LARGEST = 1 << 20  # bytes; a file of options has some kilobytes
_OWN = ("config", "dump_config", "help")  # parameters that a file cannot give
_SECRET = ("api_key",)  # that a file may give, but that are not printed
_CONFIG = (
    "YAML file of options, by their names without dashes, such as 'eval-split: 0.1'; those on the "
    "command line override it."
)
_DUMP = "Print all options as such a file, and do nothing else."


def _load(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        context.default_map = {**(context.default_map or {}), **read(context, path)}
    return path


ConfigOption = Annotated[
    Path | None, in_output("--config", metavar="FILE", help=_CONFIG, is_eager=True, callback=_load)
]
DumpConfigOption = Annotated[bool, in_output("--dump-config", help=_DUMP)]


def read(context: typer.Context, path: Path) -> dict[str, Any]:
    """Return the options that a file gives, by parameter, each as the text that says the same.

    Raises:
      BadParameter: the file cannot be read, is not a YAML mapping of options, or gives one that
        the command does not have, or a value that it does not take.
    """
    known = {flag: p for p in context.command.params for flag in p.opts if flag[:2] == "--"}
    found: dict[str, Any] = {}
    for key, value in _mapping(path).items():
        flag = f"--{str(key).replace('_', '-')}"
        parameter = known.get(flag)
        if parameter is None or parameter.name in _OWN:
            raise _wrong(path, f"{shown(str(key))} {_unknown(flag, parameter, [*known])}")
        if parameter.name in found:
            raise _wrong(path, f"{flag[2:]} is there twice, with _ and with -")
        if value is not None:
            found[parameter.name or ""] = _checked(context, path, parameter, value)
    return found


def _unknown(flag: str, parameter: Any, known: list[str]) -> str:
    if parameter is not None:
        return "is only for the command line"
    instead = advice(flag, known)
    if instead is None:
        close = difflib.get_close_matches(flag, known, n=2, cutoff=0.7)
        instead = f"perhaps {' or '.join(close)}" if close else "the help lists all of them"
    return f"is not an option; {instead.replace('--', '')}"


def _checked(context: typer.Context, path: Path, parameter: Any, value: Any) -> Any:
    """Return a value as texts, once the option has taken them."""
    name = parameter.opts[0].removeprefix("--")
    if isinstance(value, list) and not parameter.multiple:
        raise _wrong(path, f"{name} must be a single value; several are one text, such as 'a,b'")
    values = value if isinstance(value, list) else [value]
    texts = [_text(path, name, x, bool(getattr(parameter, "is_flag", False))) for x in values]
    given: Any = texts if parameter.multiple else texts[0]
    try:
        parameter.process_value(context, given)
    except typer.BadParameter as error:
        what = describe_value(error.message, ", ".join(map(str, texts)))
        raise _wrong(path, f"{name} {what}") from None
    return given


def _text(path: Path, name: str, value: Any, is_flag: bool) -> Any:
    """Return a YAML scalar as the command line would have it."""
    if is_flag:
        if not isinstance(value, bool):
            raise _wrong(path, f"{name} must be true or false, got {shown(repr(value))}")
        return value
    if isinstance(value, bool):
        raise _wrong(path, f"{name} must not be {str(value).lower()}; put text into quotes")
    if not isinstance(value, str | int | float):
        raise _wrong(path, f"{name} must be a text, a number or a list of them")
    return value if isinstance(value, str) else repr(value)


def _mapping(path: Path) -> Mapping[Any, Any]:
    """Return what a YAML file contains, whose keys must all be different."""
    import yaml

    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise _wrong(path, "is too large for a file of options")
        root = yaml.compose(data.decode("utf-8"), yaml.SafeLoader)
        _refuse_twice(path, root)
        found = yaml.load(data.decode("utf-8"), yaml.SafeLoader)
    except OSError as error:
        raise _wrong(path, error.strerror or str(error)) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _wrong(path, f"is not valid YAML ({_in_one_line(error)})") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise _wrong(path, "must contain lines such as 'lr: 1e-4'")
    return found


def _refuse_twice(path: Path, root: Any) -> None:
    """Raise if a key is there twice, of which YAML would take the last."""
    seen = set()
    for key, _ in getattr(root, "value", ()) if getattr(root, "id", "") == "mapping" else ():
        if key.value in seen:
            raise _wrong(path, f"{shown(str(key.value))} is there twice")
        seen.add(key.value)


def _in_one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error)
    place = "" if mark is None else f" in line {mark.line + 1}"
    return f"{shown(' '.join(what.split()))}{place}"


def _wrong(path: Path, what: str) -> typer.BadParameter:
    return typer.BadParameter(f"{path}: {what}")


def dump(context: typer.Context) -> str:
    """Return the options of a command as YAML, which `read` would read back to the same.

    An option that is not given and has no default is left out, and so is a secret.
    """
    import yaml

    found = {}
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if parameter.name not in (*_OWN, *_SECRET) and value is not None and value not in ((), []):
            found[parameter.opts[0].removeprefix("--")] = _plain(value)
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=10**6).rstrip("\n")


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, bool | int | float) else str(value)
