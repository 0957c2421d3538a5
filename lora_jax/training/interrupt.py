"""Ctrl-C and SIGTERM as a request to stop, which the loop checks between steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lora_jax.core.signals import SIGNALS, Interrupt, handled_by, restore


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Record the first SIGINT or SIGTERM within its block; a second one acts as usual.

    Only the main thread can do this. The previous handlers are restored after the block. Python
    runs them only once XLA has finished compiling; `lora_jax.core.signals.watched` does not wait.
    """
    interrupt = Interrupt()
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, frame: FrameType | None) -> None:
        interrupt.signal = number
        restore(before)

    with handled_by(note, before):
        yield interrupt
