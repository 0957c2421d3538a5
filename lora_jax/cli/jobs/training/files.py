"""The files that `--data` and `--eval` name, and their weights."""

from pathlib import Path

from lora_jax.cli.train_options import TrainOptions
from lora_jax.core.foreign import shown
from lora_jax.training.mixing.weights import parse
from lora_jax.training.rows.arrow import HELD_OUT, TRAINING, is_dataset
from lora_jax.training.streaming.files import divide_directory, find_files


def training_files(options: TrainOptions) -> tuple[list[Path], list[float]]:
    """Return the files to train on, and how often their rows are visited per epoch.

    Raises:
      DataError: a directory or pattern stands for no file, or a weight has no meaning.
    """
    found = [(file, x) for name, x in parse(options.data) for file in find_files([name])]
    return [file for file, _ in found], [weight for _, weight in found]


def left_out(options: TrainOptions) -> tuple[str, ...]:
    """Return notes about files in directories of --data that are not trained on."""
    directories = [path for path, _ in parse(options.data) if path.is_dir()]
    plain = [path for path in directories if not is_dataset(path)]
    others = [str(x) for path in plain for x in divide_directory(path, TRAINING)[1]]
    if not others:
        return ()
    named = ", ".join(map(shown, others[:_SHOWN])) + (", ..." if others[_SHOWN:] else "")
    return (f"not trained on, as their names tell other splits: {named}",)


_SHOWN = 3


def held_out_files(options: TrainOptions) -> list[Path]:
    """Return the files to evaluate on; of splits the one that is held out."""
    return find_files(options.held_out or (), HELD_OUT)
