"""Signals while the main thread is in C, where Python's handlers wait."""

import hashlib
import os
import signal
import threading
import time

import pytest

from lora_jax.core.signals import SIGNALS, watched


@pytest.mark.parametrize("number", SIGNALS)
def test_callbacks_come_at_once(number):
    """Both signals are answered before the main thread returns from C."""
    moments, answered = [], threading.Event()
    before = [signal.getsignal(each) for each in SIGNALS]

    def called(name):
        moments.append((name, time.perf_counter()))
        answered.set()

    def send():
        for _ in range(2):
            time.sleep(0.02)
            answered.clear()
            os.kill(os.getpid(), number)
            answered.wait(10)

    with watched(lambda: called("first"), lambda: called("second")) as interrupt:
        assert not interrupt()
        sender = threading.Thread(target=send)
        sender.start()
        hashlib.pbkdf2_hmac("sha256", b"x", b"y", 3_000_000)  # in C, without the lock
        ended = time.perf_counter()
        sender.join()
        assert interrupt() and interrupt.signal == number
    assert [name for name, _ in moments] == ["first", "second"]
    assert all(moment < ended for _, moment in moments)
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert not any(thread.name == "signals" for thread in threading.enumerate())
