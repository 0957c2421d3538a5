"""Data that `lora-jax train` reads while it trains: large files, or any with `--stream`."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from lora_jax.cli.jobs.training.files import held_out_files, training_files
from lora_jax.cli.jobs.training.model import TrainableModel
from lora_jax.cli.plurals import count
from lora_jax.cli.train_options import CAUSAL_LM, DPO, PREFERENCES, TrainOptions
from lora_jax.training import run_record
from lora_jax.training.batching import Data, Source, cut_streams, pack_examples
from lora_jax.training.dataset import STREAM, Rows
from lora_jax.training.packing import assign, assign_in_order
from lora_jax.training.preference.pairs import (
    KIND,
    SLOTS,
    Pair,
    Pairs,
    encode_pairs,
    pack_pairs,
    with_slots,
)
from lora_jax.training.rows.compressed import on_disk
from lora_jax.training.rows.fields import Fields
from lora_jax.training.streaming.files import total_bytes
from lora_jax.training.streaming.pieces import divide, read_piece
from lora_jax.training.streaming.stream import PIECE, WINDOW, Reader, Stream, held_out_rows
from lora_jax.training.tokenize import Example, encode_examples, encode_stream

LARGE = 100 << 20  # bytes of data that is streamed
#: The tasks whose data can be read while they train: --task dpo has a reference to compute before.
STREAMED = (CAUSAL_LM, *(task for task in PREFERENCES if task != DPO))
_EVAL_ROWS = 1024  # of held-out rows, unless --eval-rows says how many
_MOST_PIECES = 200_000


Options = TypeVar("Options", bound=TrainOptions)


def choose_streaming(options: Options, resumed: bool) -> Options:
    """Return the options with the choice of `--stream`: as given, as before, or by the size."""
    if options.stream is not None:
        return options
    if resumed:
        return dataclasses.replace(options, stream=bool(run_record.recorded(options.out, "stream")))
    files, _ = training_files(options)
    return dataclasses.replace(
        options, stream=options.task in STREAMED and total_bytes(files) > LARGE
    )


def describe_rows(data: Source) -> str:
    """Return how many rows there are, in words."""
    if isinstance(data, Data):
        return count(len(data), "row")
    return f"about {count(data.steps_per_epoch(1), 'row')}"


def open_stream(
    options: TrainOptions, model: TrainableModel
) -> tuple[Stream, Data | None, tuple[str, ...]]:
    """Return the rows to train on, those held out, and notes about the first ones.

    Raises:
      DataError: files cannot be read, some of the rows that are read first are damaged, or no row
        is held out.
    """
    reader = _reader(options, model, *training_files(options), options.eval_split)
    notes = ["the data is read while training (--no-stream reads it first)"]
    notes += [f"in the first rows: {note}" for note in _notes(options, model, reader)]
    held_out = None
    if options.eval_split or options.held_out:
        others = held_out_files(options)
        judged = _reader(options, model, others, [1.0] * len(others), 1.0) if others else reader
        held_out = held_out_rows(judged, options.most_eval_rows or _EVAL_ROWS)
        if not options.most_eval_rows and len(held_out) == _EVAL_ROWS:
            notes.append(f"{_EVAL_ROWS} held-out rows are evaluated (see --eval-rows)")
    return Stream(reader, options.out, jax.process_index()), held_out, tuple(notes)


def _reader(
    options: TrainOptions,
    model: TrainableModel,
    files: Sequence[Path],
    weights: Sequence[float],
    held_out: float,
) -> Reader:
    """Return what reads the rows of files."""
    fields = Fields.parse(options.field or ())
    whole = total_bytes(map(on_disk, files))
    size = min(max(PIECE, whole // _MOST_PIECES), whole // (WINDOW * options.size))
    parts = [divide([file], max(1, size), options.encoding, fields) for file in files]
    is_weighted = any(weight != 1 for weight in weights)
    sources = tuple(zip(map(len, parts), weights, strict=True)) if is_weighted else ()
    read = Reader(
        tuple(piece for part in parts for piece in part),
        len,
        lambda _: None,
        options.encoding,
        held_out,
        options.seed,
        fields,
        sources,
        KIND if options.task in PREFERENCES else None,
    )
    make = _of_streams if read.kind == STREAM else _of_rows
    encode, pack = (_of_pairs if options.task in PREFERENCES else make)(options, model)
    return dataclasses.replace(read, encode=encode, pack=pack)


def _of_streams(options: TrainOptions, model: TrainableModel) -> tuple[Any, Any]:
    def encode(rows: Rows) -> np.ndarray | None:
        ids = encode_stream(rows, model.tokenizer, vocabulary=model.vocabulary, may_be_empty=True)
        return ids if len(ids) > 1 else None

    return encode, partial(cut_streams, length=options.length)


def _of_rows(options: TrainOptions, model: TrainableModel) -> tuple[Any, Any]:
    by = assign if options.shuffle else assign_in_order

    def encode(rows: Rows) -> tuple[Example, ...] | None:
        found = encode_examples(
            rows,
            model.tokenizer,
            options.length + 1,
            vocabulary=model.vocabulary,
            may_be_empty=True,
            mask_prompts=options.mask_prompt,
        )
        return found.examples or None

    def pack(parts: Sequence[Sequence[Example]]) -> Data:
        return pack_examples([example for part in parts for example in part], options.length, by)

    return encode, pack


def _of_pairs(options: TrainOptions, model: TrainableModel) -> tuple[Any, Any]:
    by = assign if options.shuffle else assign_in_order

    def encode(rows: Rows) -> tuple[Pair, ...] | None:
        return _encode_pairs(rows, options, model).pairs or None

    def pack(parts: Sequence[Sequence[Pair]]) -> Data:
        found = pack_pairs([pair for part in parts for pair in part], options.length, by)
        return with_slots([found], min(SLOTS, options.length + 1))[0]

    return encode, pack


def _encode_pairs(rows: Rows, options: TrainOptions, model: TrainableModel) -> Pairs:
    given = (rows, model.tokenizer, options.length + 1)
    return encode_pairs(*given, vocabulary=model.vocabulary, may_be_empty=True)


def _notes(options: TrainOptions, model: TrainableModel, reader: Reader) -> tuple[str, ...]:
    """Return what is to be said about the rows of the first piece."""
    rows = read_piece(reader.pieces[0], options.encoding, None, reader.fields, reader.prefer)
    if rows is None or rows.kind == STREAM:
        return ()
    ignored = (f"ignored keys: {', '.join(rows.ignored)}",) if rows.ignored else ()
    if rows.kind == KIND:
        return (*ignored, *_encode_pairs(rows, options, model).notes)
    found = encode_examples(
        rows,
        model.tokenizer,
        options.length + 1,
        vocabulary=model.vocabulary,
        stops=model.stops,
        may_be_empty=True,
    )
    return (*ignored, *found.notes)
