"""Ctrl-C and SIGTERM as a request to stop, which the loop checks between steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Interrupt:
    """Whether the process was asked to stop, and by which signal."""

    signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Record the first SIGINT or SIGTERM within its block; a second one acts as usual.

    Only the main thread can do this. The previous handlers are restored after the block.
    """
    interrupt = Interrupt()
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, frame: FrameType | None) -> None:
        interrupt.signal = number
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
