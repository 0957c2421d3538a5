"""The command line, `lora-jax`: everyday jobs without a line of Python.

It needs the packages in the extra "cli": `pip install "lora-jax[cli]"`.
"""

import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from lora_jax.cli import boundary
from lora_jax.cli.exit_status import INTERRUPTED
from lora_jax.core.signals import SIGNALS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `lora-jax` with these arguments (None: the process's) and return its exit status.

    Every failure is one line on stderr, see `boundary`; nothing is raised.

    >>> main(["--version"])
    lora-jax 0.1.0
    0
    """
    return boundary.run(arguments)


def entry() -> NoReturn:
    """Run `lora-jax` as a process, and end it.

    Once it was interrupted, later signals do not disturb the interpreter's end.
    """
    status = main()
    if status == INTERRUPTED:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    sys.exit(status)
