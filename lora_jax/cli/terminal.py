"""Where the commands print tables to."""

import os
import sys

from rich.console import Console

PIPED_WIDTH = 160  # no table needs to fold where nobody looks at a screen


def console() -> Console:
    """Stdout as rich sees it: as wide as the terminal, or $COLUMNS, and wide in a pipe."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=PIPED_WIDTH if piped else None, highlight=False)
