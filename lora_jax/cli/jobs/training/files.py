"""The files that `--data` and `--eval` name, and their weights."""

from pathlib import Path

from lora_jax.cli.train_options import TrainOptions
from lora_jax.training.mixing.weights import parse
from lora_jax.training.rows.arrow import HELD_OUT
from lora_jax.training.streaming.files import find_files


def training_files(options: TrainOptions) -> tuple[list[Path], list[float]]:
    """Return the files to train on, and how often their rows are visited per epoch.

    Raises:
      DataError: a directory or pattern stands for no file, or a weight has no meaning.
    """
    found = [(file, x) for name, x in parse(options.data) for file in find_files([name])]
    return [file for file, _ in found], [weight for _, weight in found]


def held_out_files(options: TrainOptions) -> list[Path]:
    """Return the files to evaluate on; of a `DatasetDict` of `datasets` its held-out split."""
    return find_files(options.held_out or (), HELD_OUT)
