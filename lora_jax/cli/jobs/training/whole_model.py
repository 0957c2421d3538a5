"""`lora-jax train --full`: all weights train, and the run leaves models, not adapters."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lora_jax as lora
from lora_jax import models
from lora_jax.cli import sources
from lora_jax.cli.jobs import model_output
from lora_jax.cli.jobs.training.model import TrainableModel
from lora_jax.cli.jobs.training.results import Results
from lora_jax.cli.layers_option import parse_layers
from lora_jax.cli.targets import resolve_leaves
from lora_jax.cli.train_options import TrainOptions, names
from lora_jax.core.dtypes import is_floating
from lora_jax.core.paths import flatten_with_paths, layer_number
from lora_jax.files.disk import processes
from lora_jax.files.disk.atomic import write_directory
from lora_jax.models import saving
from lora_jax.training import log
from lora_jax.training.errors import TrainingError

MODEL = "model"  # the directory of the last model of a run


def config_of(options: TrainOptions, model: TrainableModel) -> lora.LoraConfig:
    """Return the configuration that trains all weights of a model, or those of some layers.

    Raises:
      LoraError: --exclude names something else, or --layers selects nothing.
    """
    leaves, _ = flatten_with_paths(model.params)
    excluded = set(resolve_leaves(names(options.exclude), model.params, model.naming))
    paths = [path for path, x in leaves.items() if is_floating(x) and path not in excluded]
    layers = parse_layers(options.layers)
    if layers is not None:
        paths = _in_layers(options, layers, paths, model.config.num_hidden_layers)
    if not paths:
        raise TrainingError("--full: nothing is left to train; leave out --exclude or --layers")
    return lora.LoraConfig(targets=(), train=paths)


def _in_layers(options: TrainOptions, layers: Any, paths: list[str], count: int) -> list[str]:
    if options.scan:
        raise TrainingError("--full with --layers needs one weight per layer; leave out --scan")
    every = range(count)
    chosen = every[layers] if isinstance(layers, slice) else layers
    numbers = {every[n] for n in chosen if -count <= n < count}
    if not numbers:
        raise TrainingError(f"--layers '{options.layers}': the model has {count} layers")
    placed = ((path, layer_number(path)) for path in paths)
    return [path for path, place in placed if place is not None and place[1] in numbers]


@dataclass(frozen=True)
class WholeModels(Results):
    """How the models of a run are written: as directories that need no adapter."""

    model: models.Pretrained = dataclasses.field(kw_only=True)  # as it was before the first step

    @property
    def what(self) -> str:
        """What a run leaves."""
        return "model"

    def path(self, name: str) -> Path:
        """Return where models are written."""
        return self.options.out / (MODEL if name == "adapter" else name)

    def check(self, adapters: Any) -> None:
        """Check before the first step that models can be written; nothing is.

        Raises:
          LoraError: the model has weights without a name.
        """
        saving.streamed_files(self.model)

    def write(self, name: str, adapters: Any, record: log.Record) -> None:
        """Write a model in Hugging Face's layout, with the base's tokenizer and other files.

        Its weights have the dtypes of the base's.
        """
        params = lora.merge(lora.join(self.task.params, adapters))
        path, base = self.path(name), sources.find_model(self.options.model)
        beside = {**model_output.files_beside(base), **self.tokenizer}
        processes.by_first(lambda: write_directory(path, beside))
        models.save(path, dataclasses.replace(self.model, params=params))

    def next_words(self, path: Path) -> list[str]:
        """Return the options of a command that uses the model."""
        return ["--model", str(path)]
