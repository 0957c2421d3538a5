"""Ctrl-C and SIGTERM, answered at once and without an exception in the middle of XLA."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Interrupt:
    """Whether the process was asked to stop, and by which signal."""

    signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None


@contextmanager
def watched(
    first: Callable[[], None],
    second: Callable[[], None],
    signals: Sequence[signal.Signals] = SIGNALS,
) -> Iterator[Interrupt]:
    """Record the first SIGINT or SIGTERM within its block, and call back at once at each.

    The callbacks run in a thread, so also while the main thread compiles. A `KeyboardInterrupt`
    that the main thread raises within XLA can crash it or get lost, so a callback that is to end
    the process must do so with `os._exit`.

    Only the main thread can do this. The previous handlers are restored after the block.

    Args:
      first: called at the first signal, which `Interrupt` records.
      second: called at every later one.
      signals: which signals to watch.
    """
    interrupt = Interrupt()

    def note(number: int, frame: FrameType | None) -> None:
        interrupt.signal = interrupt.signal or number

    def listen() -> None:
        asked = 0
        while number := os.read(reader, 1):
            if number[0] in signals:
                asked += 1
                interrupt.signal = interrupt.signal or number[0]
                (first if asked == 1 else second)()

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    with handled_by(note, {number: signal.getsignal(number) for number in signals}):
        descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        try:
            yield interrupt
        finally:
            signal.set_wakeup_fd(descriptor)
            os.close(writer)
            thread.join()
            os.close(reader)


@contextmanager
def handled_by(
    note: Callable[[int, FrameType | None], None], before: Mapping[signal.Signals, Any]
) -> Iterator[None]:
    """Install a handler for the signals of `before` in a block, and those of `before` after it."""
    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        restore(before)


def restore(handlers: Mapping[signal.Signals, Any]) -> None:
    """Install handlers by signal."""
    for number, handler in handlers.items():
        signal.signal(number, handler)
