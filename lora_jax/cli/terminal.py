"""What a model says, on stdout."""

import sys

from lora_jax.core.foreign import for_terminal


def write(piece: str) -> None:
    """Write a part of a text at once: as it is, but on a screen without control characters."""
    sys.stdout.write(for_terminal(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()
