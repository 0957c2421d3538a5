"""`--config FILE.yaml`: a command's options in a file, under their names without dashes.

A value in the file is read as the same text on the command line would be, so both are checked by
the same rules; the command line overrides the file.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
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
    "YAML file of options, by their names without dashes, such as 'model: tiny'; those on the "
    "command line override it."
)
_DUMP = "Print all options as such a file, and do nothing else."


def _load(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        context.default_map = {**(context.default_map or {}), **read(context, path)}
    return path


_ConfigOption = Annotated[
    Path | None, in_output("--config", metavar="FILE", help=_CONFIG, is_eager=True, callback=_load)
]
_DumpConfigOption = Annotated[bool, in_output("--dump-config", help=_DUMP)]


def _own(config: _ConfigOption = None, dump_config: _DumpConfigOption = False) -> None:
    """Have the parameters that `configurable` adds to those of a command."""


def configurable(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with --config too, a file of options, and --dump-config, which prints one.

    Args:
      command: a function whose parameters typer reads, with a `context` or without.
    """
    parameters = inspect.signature(command).parameters
    asks = "context" in parameters

    def run(context: typer.Context, config: Any, dump_config: bool, **given: Any) -> None:
        if dump_config:
            typer.echo(dump(context))
        else:
            command(**({"context": context} if asks else {}), **given)

    first = next(iter(inspect.signature(run).parameters.values()))
    others = [one for name, one in parameters.items() if name != "context"]
    added = inspect.signature(_own).parameters.values()
    run.__doc__ = command.__doc__
    run.__signature__ = inspect.Signature([first, *others, *added])  # type: ignore[attr-defined]
    return run


def read(context: typer.Context, path: Path) -> dict[str, Any]:
    """Return the options that a file gives, by parameter, each as the text that says the same.

    Raises:
      BadParameter: the file cannot be read, is not a YAML mapping of options, or gives one that
        the command does not have, or a value that it does not take.
    """
    known = {flag: p for p in context.command.params for flag in _names(p)}
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


def _names(parameter: Any) -> list[str]:
    """Return the long names of an option; an argument is in a file as if it were one."""
    if parameter.param_type_name == "argument":
        return [f"--{parameter.name}"]
    return [flag for flag in parameter.opts if flag[:2] == "--"]


def _is_list(parameter: Any) -> bool:
    return parameter.nargs == -1 or bool(getattr(parameter, "multiple", False))


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
    name = _names(parameter)[0].removeprefix("--")
    if isinstance(value, list) and not _is_list(parameter):
        raise _wrong(path, f"{name} must be a single value; several are one text, such as 'a,b'")
    values = value if isinstance(value, list) else [value]
    texts = [_text(path, name, x, bool(getattr(parameter, "is_flag", False))) for x in values]
    given: Any = texts if _is_list(parameter) else texts[0]
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
            raise _wrong(path, f"{name} must be true or false, got {shown(str(value))}")
        return value
    if isinstance(value, bool):
        raise _wrong(path, f"{name} must not be {str(value).lower()}; put text into quotes")
    if not isinstance(value, str):
        raise _wrong(path, f"{name} must be a text, a number or a list of them")
    return value


def _mapping(path: Path) -> Mapping[Any, Any]:
    """Return what a YAML file contains, whose keys must all be different."""
    import yaml

    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise _wrong(path, "is too large for a file of options")
        text, loader = data.decode("utf-8"), _loader()
        _refuse_twice(path, yaml.compose(text, loader))
        found = yaml.load(text, loader)
    except OSError as error:
        raise _wrong(path, error.strerror or str(error)) from None
    except (yaml.YAMLError, ValueError, LookupError, RecursionError) as error:
        raise _wrong(path, f"is not valid YAML ({_in_one_line(error)})") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise _wrong(path, "must contain lines such as 'lr: 1e-4'")
    return found


def _loader() -> Any:
    """Return a loader that keeps numbers as they are written: 1:3 is a slice, 010 is ten."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    for kind in ("int", "float", "timestamp"):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", yaml.SafeLoader.construct_scalar)
    return Loader


def _refuse_twice(path: Path, root: Any) -> None:
    """Raise if a key is not a text, or is there twice: YAML would take the last."""
    seen = set()
    for key, _ in getattr(root, "value", ()) if getattr(root, "id", "") == "mapping" else ():
        if not isinstance(key.value, str):
            raise _wrong(
                path, f"a key in line {key.start_mark.line + 1} is not the name of an option"
            )
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
            found[_names(parameter)[0].removeprefix("--")] = _plain(value)
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=10**6).rstrip("\n")


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, bool | int | float) else str(value)
