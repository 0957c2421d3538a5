"""`--remat`: what a training step recomputes; `auto` compiles steps until one fits into memory."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from lora_jax.cli.jobs.train_data import Task
from lora_jax.cli.jobs.train_model import TrainableModel, with_remat
from lora_jax.cli.train_options import TrainOptions
from lora_jax.files.disk import processes
from lora_jax.models.bert import Bert
from lora_jax.models.remat import NONE, POLICIES
from lora_jax.training.loop import Job
from lora_jax.training.running.step_memory import available_bytes, needed_bytes

AUTO = "auto"


def choose(
    options: TrainOptions,
    model: TrainableModel,
    task: Task,
    trained: Collection[str],
    job: Job,
    adapters: Any,
    say: Callable[[str], None],
) -> Job:
    """Return the job with the loss of the model that recomputes what the options say.

    `auto` takes the policy that recomputes least of those whose compiled step fits into memory,
    and says what it needs.

    Raises:
      TrainingError: the model's layers cannot recompute.
    """

    def with_policy(name: str) -> Job:
        return dataclasses.replace(job, loss=task.loss(with_remat(model, name), trained))

    if options.remat != AUTO:
        return with_policy(options.remat)
    policies = [NONE] if isinstance(model.module, Bert) else [*POLICIES]
    room = available_bytes() if options.memory is None else int(options.memory * 1e9)
    least = min(map(float, processes.tell_all(repr(room))))
    for name in policies:
        found = with_policy(name)
        needed = needed_bytes(found, adapters)
        if needed <= least:
            break
    fits = "" if needed <= least else "; that is too much: lower --batch or --length"
    say(f"--remat {name}: a step needs {needed / 1e9:.2f} GB of {least / 1e9:.2f} GB{fits}")
    return found
