"""`--remat`: what a training step recomputes; `auto` compiles steps until one fits into memory."""

from collections.abc import Callable

from lora_jax.cli.train_options import TrainOptions
from lora_jax.files.disk import processes
from lora_jax.models.remat import POLICIES
from lora_jax.training.running.step_memory import available_bytes

AUTO = "auto"


def choose(
    options: TrainOptions,
    needed: Callable[[str], int],
    say: Callable[[str], None],
) -> str:
    """Return the policy that the options name, what the model's layers recompute.

    `auto` takes the policy that recomputes least of those whose compiled step fits into memory,
    and says what it needs.

    Args:
      options: of the command line.
      needed: compiles the step with a policy, and returns the bytes that it needs.
      say: takes a line.
    """
    if options.remat != AUTO:
        return options.remat
    room = available_bytes() if options.memory is None else int(options.memory * 1e9)
    least = min(map(float, processes.tell_all(repr(room))))
    for name in POLICIES:
        bytes_needed = needed(name)
        if bytes_needed <= least:
            break
    fits = "" if bytes_needed <= least else "; that is too much: lower --batch or --length"
    say(f"--remat {name}: a step needs {bytes_needed / 1e9:.2f} GB of {least / 1e9:.2f} GB{fits}")
    return name
