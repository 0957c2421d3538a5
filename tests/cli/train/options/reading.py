"""The data that `lora-jax train` would train on, without a step."""

import functools
import pathlib

from lora_jax.cli.jobs.training.data import read_task
from lora_jax.cli.jobs.training.model import open_model
from lora_jax.cli.train_options import TrainOptions


@functools.cache
def tiny():
    return open_model("tiny", "float32", scan=False)


def read(data, out="/nowhere", length=64, **options):
    """Return the task of a run on the tiny model, whose tokens are bytes."""
    data = [pathlib.Path(one) for one in data]
    given = TrainOptions("tiny", data, pathlib.Path(out), length=length, **options)
    return read_task(given, tiny())


def text_of(row):
    """Return the text of a row's tokens, and that of those to be predicted."""
    decode = lambda ids: tiny().tokenizer.decode([int(i) for i in ids])
    ids, weights = row["ids"], row["weights"]
    return decode(ids[row["segments"] > 0]), decode(ids[weights > 0])
