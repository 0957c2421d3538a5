"""Turn every failure of the command line into one line on stderr and an exit status."""

import contextlib
import errno
import json
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from lora_jax.cli import other_processes
from lora_jax.cli.exit_status import FAILED, INTERRUPTED, OK, PIPE_CLOSED
from lora_jax.core.errors import AssetError, LoraError
from lora_jax.core.foreign import escaped
from lora_jax.core.signals import watched

DEBUG = "LORA_JAX_DEBUG"
#: Packages that `pip install lora-jax` alone does not install, and the extra that has them.
OPTIONAL = {
    **dict.fromkeys(
        ("gguf", "jinja2", "matplotlib", "orbax", "rich", "tokenizers", "typer", "yaml"), "cli"
    ),
    **dict.fromkeys(("starlette", "uvicorn"), "serve"),
}
SHOWN = 12  # lines of a long list of problems

_ADVICE = {
    errno.ENOENT: "no such file or directory",
    errno.EACCES: "permission denied; choose a path that you may read and write",
    errno.EPERM: "permission denied; choose a path that you may read and write",
    errno.EROFS: "the disk is read-only; choose another path",
    errno.ENOSPC: "the disk is full; free some space or choose another path",
    errno.EDQUOT: "the disk quota is exhausted; free some space or choose another path",
    errno.EISDIR: "is a directory, but a file is needed",
    errno.ENOTDIR: "is not a directory, but one is needed",
    errno.EEXIST: "exists already",
}


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status, one of those in the application's help."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            with _ended_by_ctrl_c() if arguments is None else contextlib.nullcontext():
                return _run(words)
    except SystemExit:
        raise
    except BrokenPipeError:
        _discard_output()
        return PIPE_CLOSED
    except BaseException as error:
        if os.environ.get(DEBUG):
            traceback.print_exc()
        line, status = explain(error, words)
        if other_processes.is_first() or not other_processes.know(error):
            print(f"error: {line}", file=sys.stderr)
        other_processes.leave(error, status)
        return status


@contextlib.contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """End the process at Ctrl-C, where Python's exception could crash XLA or get lost in it.

    Files are written completely or not at all, so nothing needs to be cleaned up.
    """

    def end() -> NoReturn:
        cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar may have hidden it
        with contextlib.suppress(OSError):
            print(f"{cursor}error: interrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) != signal.default_int_handler:
        yield  # a shell's background job ignores Ctrl-C
        return
    with watched(end, end, [signal.SIGINT]):
        yield


def _run(words: list[str]) -> int:
    import typer
    from typer.main import get_command

    from lora_jax.cli.app import app

    command = get_command(app)
    try:
        with command.make_context("lora-jax", words) as context:
            command.invoke(context)
        sys.stdout.flush()  # a closed pipe must be noticed here, not at the interpreter's end
    except typer.Exit as ended:
        sys.stdout.flush()
        return ended.exit_code
    return OK


def explain(error: BaseException, words: Sequence[str] = ()) -> tuple[str, int]:
    """Return what is wrong and what to do, in one line, and the exit status.

    Args:
      error: what was raised.
      words: the command line.

    >>> explain(LoraError("the base does not fit:\\nq: missing\\nk: missing"))
    ('the base does not fit: q: missing; k: missing', 1)
    """
    if isinstance(error, KeyboardInterrupt):
        return one_line(f"interrupted: {error}" if str(error) else "interrupted"), INTERRUPTED
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        return _usage(error, words), error.exit_code
    return one_line(_message(error, words)), FAILED


def _message(error: BaseException, words: Sequence[str]) -> str:
    if isinstance(error, LoraError | AssetError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").split(".")[0]
        if package in OPTIONAL:
            return (
                f"this needs the package {package}, which is not installed: "
                f'pip install "lora-jax[{OPTIONAL[package]}]"'
            )
    if isinstance(error, OSError):
        return _os_message(error)
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text: {error}; save the file as UTF-8"
    if lost := other_processes.explain_loss(error):
        return lost
    if "No space left on device" in str(error):  # C++ libraries know no OSError
        return _ADVICE[errno.ENOSPC]
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        slots = "fewer --slots, " if words[:1] == ["sweep"] else ""
        return f"out of memory; use {slots}a smaller batch, a shorter length or --dtype bfloat16"
    return (
        f"unexpected {type(error).__name__}: {error}; this is a bug in lora-jax, "
        f"{DEBUG}=1 shows where it happened"
    )


def _os_message(error: OSError) -> str:
    what = _ADVICE.get(error.errno or 0) or error.strerror or str(error)
    place = error.filename2 or error.filename
    place = os.fsdecode(place) if isinstance(place, bytes) else place
    return f"{place}: {what}" if place is not None else what


def _usage(error: Any, words: Sequence[str]) -> str:
    """Return the mistake on the command line, and where to read the correct usage."""
    from lora_jax.cli import usage

    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "lora-jax"
    message = one_line(usage.describe(error, words)).rstrip(".")
    return f"{message}; '{path} --help' shows the usage"


def one_line(text: str) -> str:
    """Join the lines of a message into one: a heading, then the items of its list.

    Control characters are escaped, wherever the message comes from.

    >>> one_line("two are missing:\\n  q\\n  k")
    'two are missing: q; k'
    """
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    if len(lines) > SHOWN + 1:
        left = len(lines) - SHOWN
        lines = [*lines[:SHOWN], f"and {left} more ({DEBUG}=1 shows all)"]
    joined = ""
    for line in lines:
        joined += ("" if not joined else " " if joined.endswith((":", ";", ",")) else "; ") + line
    return escaped(joined)


def _show_warning(message: Any, category: type, *_: Any, **__: Any) -> None:
    if other_processes.is_first():
        print(f"warning: {one_line(str(message))}", file=sys.stderr)


def _discard_output() -> None:
    """Keep the interpreter from failing when it flushes stdout, which nobody reads any more."""
    with contextlib.suppress(OSError, ValueError):  # where stdout is not a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
