"""The command line, `lora-jax`: everyday jobs without a line of Python.

It needs the packages in the extra "cli": `pip install "lora-jax[cli]"`.
"""

from collections.abc import Sequence

from lora_jax.cli import boundary


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `lora-jax` with these arguments (None: the process's) and return its exit status.

    Every failure is one line on stderr, see `boundary`; nothing is raised.

    >>> main(["--version"])
    lora-jax 0.1.0
    0
    """
    return boundary.run(arguments)
