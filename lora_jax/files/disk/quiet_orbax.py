"""Keep off stderr what Orbax's threads print beside an error."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator

_LOGGERS = ("absl", "asyncio")
_LATE = 0.2  # seconds within which reads and writes end after one has failed


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keep the tracebacks off stderr that threads of Orbax and tensorstore print beside an error.

    Reads and writes under way when another one fails find Orbax's event loop closed, a moment
    later.
    """
    loggers, hooks = [*map(logging.getLogger, _LOGGERS)], (sys.excepthook, sys.unraisablehook)
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    sys.excepthook, sys.unraisablehook = lambda *_: None, lambda _: None
    try:
        yield
    except Exception:
        time.sleep(_LATE)
        raise
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled
        sys.excepthook, sys.unraisablehook = hooks
