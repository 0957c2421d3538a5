"""The data of `lora-jax train`: from files to batches, and the loss for them."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import numpy as np

from lora_jax.cli.classifiers import LABELS, POOLING
from lora_jax.cli.jobs.training import preference
from lora_jax.cli.jobs.training.files import held_out_files, left_out, training_files
from lora_jax.cli.jobs.training.model import TrainableModel
from lora_jax.cli.jobs.training.parts import Parts, join, split
from lora_jax.cli.jobs.training.stream import STREAMED, open_stream
from lora_jax.cli.train_options import (
    CLASSIFICATION,
    MEAN,
    PREFERENCES,
    TrainOptions,
)
from lora_jax.models.decoder.router_load import hidden_with_router_loss
from lora_jax.models.published_classifier import head_of_family, new_pooler
from lora_jax.training.batching import (
    Data,
    Source,
    cut_stream,
    cut_streams,
    pack_examples,
    pack_labelled,
)
from lora_jax.training.chunked_loss import (
    Hidden,
    language_sums_of_frozen_head,
    language_sums_of_trained_head,
)
from lora_jax.training.classification import (
    Classifier,
    classes,
    encode_labelled,
    with_head,
)
from lora_jax.training.dataset import STREAM, Rows, read_rows
from lora_jax.training.errors import DataError, TrainingError
from lora_jax.training.loss import class_sums
from lora_jax.training.mixing.mixture import mix
from lora_jax.training.preference.pairs import KIND
from lora_jax.training.router_loss import with_router_loss
from lora_jax.training.rows.fields import Fields
from lora_jax.training.step import Loss
from lora_jax.training.tokenize import encode_examples, encode_stream

SLOTS = 16  # maximum texts per row of a classifier
Apply = Callable[[Any, Any, Any], Any]  # (params, ids, segments) -> logits


@dataclasses.dataclass(frozen=True)
class Task:
    """A model's function for one task, and the data for it."""

    apply: Apply
    params: Any
    loss: Callable[..., Loss]  # (model, paths of what trains, chunk=None), see `language_loss`
    data: Source
    held_out: Data | None
    notes: tuple[str, ...]
    prefix: str = ""  # before the model's own paths
    whole: tuple[str, ...] = ()  # fully trained leaves
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


def read_task(options: TrainOptions, model: TrainableModel) -> Task:
    """Read the data and make batches of them.

    Raises:
      DataError: files cannot be read or encoded, or are of several kinds.
      TrainingError: the model cannot do the task.
    """
    task = _streamed(options, model) if options.stream else _in_memory(options, model)
    return dataclasses.replace(task, notes=(*left_out(options), *task.notes))


def _in_memory(options: TrainOptions, model: TrainableModel) -> Task:
    """Return a task whose data is read at first."""
    prefer = KIND if options.task in PREFERENCES else None
    fields = Fields.parse(options.field or ())
    read = partial(read_rows, encoding=options.encoding, fields=fields, prefer=prefer)
    paths, weights = training_files(options)
    files = [read(path) for path in paths]
    others = [read(path) for path in held_out_files(options)]
    kinds = {rows.kind: rows.source for rows in [*files, *others]}
    if len(kinds) > 1:
        named = ", ".join(f"{source} contains {kind} rows" for kind, source in kinds.items())
        raise DataError(f"files of several kinds: {named}; give files of one kind")
    ignored = sorted({key for rows in [*files, *others] for key in rows.ignored})
    notes = (f"ignored keys: {', '.join(ignored)}",) if ignored else ()
    if options.task == CLASSIFICATION:
        task = _classification(options, model, split(options, files, weights, others))
    elif options.task in PREFERENCES:
        task = _preferences(options, model, split(options, files, weights, others))
    else:
        apply = _decoder(options, model)
        if files[0].kind == STREAM:
            data, held_out, more = _streams(options, model, files, weights, others)
        else:
            data, held_out, more = _examples(options, model, split(options, files, weights, others))
        packed = is_packed(data, held_out)
        loss = partial(language_loss, packed=packed, router_loss=options.router_loss)
        task = Task(apply, model.params, loss, data, held_out, more)
    held_out = task.held_out
    if held_out is not None and options.most_eval_rows:
        held_out = held_out.first(options.most_eval_rows)
    return dataclasses.replace(task, held_out=held_out, notes=(*notes, *task.notes))


def _decoder(options: TrainOptions, model: TrainableModel) -> Apply:
    if model.apply is None:
        raise TrainingError(
            f"{options.model} is an encoder, which cannot predict the next token; use --task "
            "classification"
        )
    return model.apply


def _streamed(options: TrainOptions, model: TrainableModel) -> Task:
    """Return a task whose data is read while it is trained on."""
    if options.task not in STREAMED:
        raise TrainingError(f"--stream is for --task {', '.join(STREAMED)}; leave it out")
    apply = _decoder(options, model)
    data, held_out, notes = open_stream(options, model)
    packed = data.reader.kind != STREAM
    loss = partial(language_loss, packed=packed, router_loss=options.router_loss)
    if options.task in PREFERENCES:
        loss = partial(preference.preference_loss, options=options, packed=True)
    return Task(apply, model.params, loss, data, held_out, notes)


def language_loss(
    model: TrainableModel,
    adapted: Collection[str],
    chunk: int | None = None,
    *,
    packed: bool,
    router_loss: float = 0.0,
) -> Loss:
    """Return the loss, whose logits are never whole if they are large.

    Args:
      model: whose head is frozen or trains.
      adapted: the paths of all that trains.
      chunk: the tokens whose logits are in memory at a time, as in `chunked_loss`.
      packed: whether a row may contain several texts. Otherwise segments say nothing that a causal
        model's own mask does not, and cuDNN's attention is faster without them.
      router_loss: weight of the loss of routers; 0 for none.

    Raises:
      ConfigError: there is a `router_loss`, but the model has no experts.
    """

    def of_states(hidden: Hidden) -> Loss:
        if model.head_path in adapted:
            return language_sums_of_trained_head(hidden, model.logits, chunk)
        return language_sums_of_frozen_head(hidden, model.head, chunk, model.finish)

    seen: Callable[..., Any] = lambda hidden: hidden
    if not packed:
        seen = lambda hidden: lambda params, ids, segments: hidden(params, ids)
    if not router_loss:
        return of_states(seen(model.hidden))
    with_loss = hidden_with_router_loss(model.module)
    return with_router_loss(of_states, seen(with_loss), router_loss)


def is_packed(*parts: Data | None) -> bool:
    """Return whether a row has several texts, or padding before its end."""
    segments = [part.arrays["segments"] for part in parts if part is not None]
    return any((x > 1).any() or (x[:, 1:] > x[:, :-1]).any() for x in segments)


def _streams(
    options: TrainOptions,
    model: TrainableModel,
    files: Sequence[Rows],
    weights: Sequence[float],
    others: Sequence[Rows],
) -> tuple[Data, Data | None, tuple[str, ...]]:
    """Encode texts as streams of tokens; hold out a fraction at the end of each."""
    encode = partial(encode_stream, tokenizer=model.tokenizer, vocabulary=model.vocabulary)
    trained: list[np.ndarray] = [encode(rows) for rows in files]
    held_out = [encode(rows) for rows in others]
    if options.eval_split:
        cuts = [len(ids) - round(len(ids) * options.eval_split) for ids in trained]
        held_out = [ids[cut:] for ids, cut in zip(trained, cuts, strict=True)]
        trained = [ids[:cut] for ids, cut in zip(trained, cuts, strict=True)]
        if any(len(ids) < 2 for ids in [*trained, *held_out]):
            raise DataError(
                f"--eval-split {options.eval_split} leaves a part without a token to predict; "
                "choose another fraction, or give a file with --eval"
            )
    judged = cut_streams(held_out, options.length) if held_out else None
    if all(weight == 1 for weight in weights):
        return cut_streams(trained, options.length), judged, ()
    return mix([cut_stream(ids, options.length) for ids in trained], weights), judged, ()


def _examples(
    options: TrainOptions, model: TrainableModel, rows: Parts
) -> tuple[Data, Data | None, tuple[str, ...]]:
    """Pack rows of text, prompts and completions, or conversations."""
    longest = options.length + 1  # the last token is not read, only predicted
    encode = partial(
        encode_examples,
        vocabulary=model.vocabulary,
        stops=model.stops,
        mask_prompts=options.mask_prompt,
    )
    parts = [encode(part, model.tokenizer, longest) for part in rows.every]
    packed = [
        pack_examples(part.examples, options.length, by)
        for part, by in zip(parts, rows.packings, strict=True)
    ]
    notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
    return *rows.join(packed), notes


def _preferences(options: TrainOptions, model: TrainableModel, rows: Parts) -> Task:
    """Pack pairs of a chosen and a rejected completion."""
    apply = _decoder(options, model)
    packed, notes = preference.pack_preferences(options, model, rows.every, rows.packings)
    packs = preference.is_packed(*packed)
    loss = partial(preference.preference_loss, options=options, packed=packs)
    return Task(apply, model.params, loss, *rows.join(packed), notes)


def _classification(options: TrainOptions, model: TrainableModel, rows: Parts) -> Task:
    """Put a fully trained head on the hidden state that transformers takes, or on their mean."""
    known = classes(join(rows.trained))
    parts = [
        encode_labelled(part, model.tokenizer, known, options.length, vocabulary=model.vocabulary)
        for part in rows.every
    ]
    slots = min(SLOTS, options.length)

    packed = [
        pack_labelled(part.texts, part.labels.tolist(), options.length, slots, by)
        for part, by in zip(parts, rows.packings, strict=True)
    ]
    apply, params, whole = _with_head(options, model, len(known), slots)
    return Task(
        apply,
        params,
        lambda model, *_: class_sums(dataclasses.replace(apply, hidden=model.hidden)),
        *rows.join(packed),
        tuple(note for part in parts for note in part.notes),
        prefix="encoder/",
        whole=whole,
        metadata={LABELS: list(known), POOLING: apply.pooling},
    )


def _with_head(
    options: TrainOptions, model: TrainableModel, classes: int, slots: int
) -> tuple[Classifier, Any, tuple[str, ...]]:
    """Return a classifier, its parameters, and the paths of those to train in full."""
    # a decoder's own head is not used, and `head/kernel` would name it too
    encoder = {name: x for name, x in model.params.items() if name != "head"}
    make = partial(with_head, model.hidden, encoder, model.width, classes, slots, options.seed)
    if options.pooling == MEAN:
        apply, params = make()
        return apply, params, ("head/kernel", "head/bias")
    head = head_of_family(model.family, model.settings)
    is_new = bool(head.pooler) and model.pooler is None
    pooler = new_pooler(head, model.width, options.seed + 1) if is_new else model.pooler
    apply, params = make(pooling=head.pooling, pooler=pooler, bias=head.bias)
    apply = dataclasses.replace(apply, activation=head.activation, epsilon=head.epsilon)
    trained = ("head", "pooler") if is_new else ("head",)
    return apply, params, tuple(f"{module}/{leaf}" for module in trained for leaf in params[module])
