"""Ctrl-C and SIGTERM as a request to stop, which the loop checks between steps."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
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
def interruptible() -> Iterator[Interrupt]:
    """Record the first SIGINT or SIGTERM within its block; a second one acts as usual.

    Only the main thread can do this. The previous handlers are restored after the block. Python
    runs them only once XLA has finished compiling; a program that must end at once uses `watched`.
    """
    interrupt = Interrupt()
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, frame: FrameType | None) -> None:
        interrupt.signal = number
        _restore(before)

    with _handled_by(note, before):
        yield interrupt


@contextmanager
def watched(first: Callable[[], None], second: Callable[[], None]) -> Iterator[Interrupt]:
    """Record the first SIGINT or SIGTERM within its block, and call back at once at each.

    The callbacks run in a thread, so also while the main thread compiles. An exception that the
    main thread raises there can crash XLA, so `second` must end the process with `os._exit`.

    Args:
      first: called at the first signal, which `Interrupt` records.
      second: called at every later one.
    """
    interrupt = Interrupt()
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, frame: FrameType | None) -> None:
        interrupt.signal = interrupt.signal or number

    def listen() -> None:
        asked = 0
        while number := os.read(reader, 1):
            if number[0] in SIGNALS:
                asked += 1
                interrupt.signal = interrupt.signal or number[0]
                (first if asked == 1 else second)()

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    with _handled_by(note, before):
        descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        try:
            yield interrupt
        finally:
            signal.set_wakeup_fd(descriptor)
            os.close(writer)
            thread.join()
            os.close(reader)


@contextmanager
def _handled_by(
    note: Callable[[int, FrameType | None], None], before: Mapping[signal.Signals, Any]
) -> Iterator[None]:
    """Install a handler of all `SIGNALS` for a block, and those of `before` after it."""
    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield
    finally:
        _restore(before)


def _restore(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
