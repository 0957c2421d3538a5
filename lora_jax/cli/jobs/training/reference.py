"""What `lora-jax train --task dpo` compares with, computed once and kept with the run."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lora_jax.cli.jobs.training.data import Task
from lora_jax.cli.jobs.training.model import TrainableModel
from lora_jax.cli.jobs.training.preference import is_packed, log_probs_of
from lora_jax.cli.jobs.training.start import Start
from lora_jax.cli.train_options import DPO, START, TrainOptions
from lora_jax.files.disk import processes, safetensors_file
from lora_jax.training.batching import Data
from lora_jax.training.distributed.placing import place_rows
from lora_jax.training.preference.log_probs import REFERENCE
from lora_jax.training.preference.reference import with_reference


def add_reference(
    options: TrainOptions,
    model: TrainableModel,
    task: Task,
    start: Start,
    say: Callable[[str], None],
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Return "data" and "held_out" of a task with log-probabilities under its reference, if any.

    A resumed run reads them, so they are the same to the bit.

    Args:
      start: the parameters before the first step; those of the task are the published model's.
      say: takes a line.
      mesh: of devices, if there are several.
    """
    parts: dict[str, Any] = {"data": task.data, "held_out": task.held_out}
    if options.task != DPO:
        return parts
    path = options.out / "reference.safetensors"
    there = {name: part for name, part in parts.items() if part is not None}
    found = processes.together(lambda: _read(path, there))
    if found is None:
        say("computing the log-probabilities of the reference")
        params = start.params if options.reference == START else task.params
        adapted = start.paths if options.reference == START else ()
        of = log_probs_of(model, adapted, packed=is_packed(*there.values()))
        place = jax.device_put if mesh is None else place_rows(mesh)
        found = {
            name: with_reference(of, params, part, options.batch, place, mesh).arrays[REFERENCE]
            for name, part in there.items()
        }
        processes.by_first(partial(safetensors_file.write, path, found))
    return parts | {
        name: dataclasses.replace(part, arrays={**part.arrays, REFERENCE: found[name]})
        for name, part in there.items()
    }


def _read(path: Path, parts: Mapping[str, Data]) -> dict[str, np.ndarray] | None:
    """Return what the file has, if it is there and fits."""
    if not path.exists():
        return None
    found, _ = safetensors_file.read(path)
    wanted = {name: part.arrays[REFERENCE].shape for name, part in parts.items()}
    return found if wanted == {name: x.shape for name, x in found.items()} else None
