"""What a command that trains says, and how Ctrl-C and SIGTERM end it."""

import contextlib
import os
import sys
from typing import NoReturn, Self

from rich.console import Console

from lora_jax.cli.exit_status import INTERRUPTED
from lora_jax.core.foreign import escaped
from lora_jax.core.signals import Interrupt, watched


class Interruptible:
    """A block that the first Ctrl-C asks to stop, and a second one ends with its process.

    Args:
      command: the command that would continue what the block does.
      console: where progress is drawn or printed.
    """

    def __init__(self, command: str, console: Console) -> None:
        self.command, self.console = command, console
        self.interrupt = Interrupt()  # true once it was asked to stop
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.interrupt = self._open.enter_context(watched(self._ask, self._end))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def say(self, text: str) -> None:
        """Print a line, whatever it contains."""
        self.console.print(escaped(text), markup=False, soft_wrap=True)

    def describe_saved(self) -> str:
        """Return in words what is saved at this moment."""
        raise NotImplementedError

    def _ask(self) -> None:
        self.say("finishing the steps under way, then saving; Ctrl-C again stops at once")

    def _end(self) -> NoReturn:
        """End the process here: an exception in the main thread would crash XLA's compiler."""
        if self.console.is_terminal:
            self.console.show_cursor(True)
        print(
            f"error: interrupted at once: {self.describe_saved()}; to resume: {self.command}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(INTERRUPTED)
