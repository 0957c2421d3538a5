"""Fine-tuning on text: data sets, packed batches, a compiled step, and a loop that can be resumed.

A model is any function `(params, ids, segments) -> logits`; a loss returns sums over a batch.

>>> import jax
>>> import numpy as np
>>> import lora_jax as lora
>>> from lora_jax import training
>>> def model(params, ids, segments):  # a bigram model: each token predicts the next
...     return params["embedding"][ids] @ params["head"]
>>> params = {"embedding": np.eye(5, 8, dtype=np.float32), "head": np.zeros((8, 5), np.float32)}
>>> data = training.cut_stream(np.arange(200, dtype=np.int32) % 5, length=9)  # 0 1 2 3 4 0 1 ...
>>> config, ids = lora.LoraConfig(rank=4, targets=["head"]), data.arrays["ids"]
>>> base, adapters = lora.split(lora.init(jax.random.key(0), params, config, model, ids, ids))
>>> tx = training.Optimizer(learning_rate=0.1).transformation(adapters, steps=30)
>>> settings = training.Settings(steps=30, rows=4)
>>> job = training.Job(training.language_sums(model), base, tx, data, settings)
>>> outcome = training.train(job, adapters)
>>> outcome.records[0]["loss"] > 1.6, outcome.records[-1]["loss"] < 0.1
(True, True)

`outcome.adapters` is what `lora_jax.save` and `lora_jax.files.peft.save` write. With
`Job(directory=...)` the run logs, saves checkpoints and resumes. `examples/sentiment` is a whole
program: a classifier on a pretrained encoder.

Step by step: `dataset` reads files, `tokenize` and `classification` make token ids, `batching`
packs them into rows, `loss`, `chunked_loss` and `step` train on a batch, `loop` runs the steps.
`streaming` does the first three piece by piece, for data that is larger than memory.
`progress` and `loss_curve` show a run; they need the extra `lora-jax[demo]`.
"""

from lora_jax.training.batching import (
    Data,
    add_labels,
    batch_of_step,
    batches,
    cut_stream,
    hold_out,
    pack_examples,
    pack_labelled,
    pack_texts,
)
from lora_jax.training.chunked_loss import (
    language_sums_of_frozen_head,
    language_sums_of_trained_head,
)
from lora_jax.training.classification import (
    Classifier,
    classes,
    encode_labelled,
    predict,
    with_head,
)
from lora_jax.training.dataset import Row, Rows, read_rows
from lora_jax.training.errors import DataError, TrainingError
from lora_jax.training.interrupt import interruptible
from lora_jax.training.loop import Job, Outcome, Settings, Watcher, steps_of_epochs, train
from lora_jax.training.loss import class_sums, language_sums
from lora_jax.training.optimizer import Optimizer
from lora_jax.training.router_loss import with_router_loss
from lora_jax.training.step import State, init_state, make_evaluation, make_step
from lora_jax.training.tokenize import encode_examples, encode_stream

__all__ = [
    "Classifier",
    "Data",
    "DataError",
    "Job",
    "Optimizer",
    "Outcome",
    "Row",
    "Rows",
    "Settings",
    "State",
    "TrainingError",
    "Watcher",
    "add_labels",
    "batch_of_step",
    "batches",
    "class_sums",
    "classes",
    "cut_stream",
    "encode_examples",
    "encode_labelled",
    "encode_stream",
    "hold_out",
    "init_state",
    "interruptible",
    "language_sums",
    "language_sums_of_frozen_head",
    "language_sums_of_trained_head",
    "make_evaluation",
    "make_step",
    "pack_examples",
    "pack_labelled",
    "pack_texts",
    "predict",
    "read_rows",
    "steps_of_epochs",
    "train",
    "with_head",
    "with_router_loss",
]
