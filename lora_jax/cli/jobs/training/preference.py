"""Preference tuning by `lora-jax train`: the batches and the loss."""

from collections.abc import Callable, Collection, Sequence
from functools import partial

from lora_jax.cli.jobs.training.model import TrainableModel
from lora_jax.cli.train_options import CPO, DPO, ORPO, PREFERENCES, SIMPO, TrainOptions
from lora_jax.training.batching import Data
from lora_jax.training.dataset import Rows
from lora_jax.training.packing import Assign
from lora_jax.training.preference import losses
from lora_jax.training.preference.log_probs import (
    PairLogProbs,
    PairLoss,
    log_probs_of_frozen_head,
    log_probs_of_trained_head,
    preference_sums,
)
from lora_jax.training.preference.pairs import encode_pairs, pack_pairs, with_slots
from lora_jax.training.step import Loss


def pack_preferences(
    options: TrainOptions, model: TrainableModel, parts: list[Rows], packings: Sequence[Assign]
) -> tuple[list[Data], tuple[str, ...]]:
    """Return the rows of each part, those to train on first, and notes about them.

    Raises:
      DataError: rows cannot be encoded.
    """
    longest = options.length + 1  # the last token is not read, only predicted
    encode = partial(encode_pairs, vocabulary=model.vocabulary)
    encoded = [encode(rows, model.tokenizer, longest) for rows in parts]
    packed = [
        pack_pairs(part.pairs, options.length, by, reference=options.task == DPO)
        for part, by in zip(encoded, packings, strict=True)
    ]
    return with_slots(packed), tuple(dict.fromkeys(note for part in encoded for note in part.notes))


def preference_loss(
    model: TrainableModel,
    adapted: Collection[str],
    chunk: int | None = None,
    *,
    options: TrainOptions,
    packed: bool,
) -> Loss:
    """Return the loss of a task; the arguments are those of `language_loss`."""
    return preference_sums(
        log_probs_of(model, adapted, chunk, packed=packed), _LOSSES[options.task](options)
    )


def is_packed(*parts: Data | None) -> bool:
    """Return whether a row holds several pairs."""
    return any(part is not None and part.arrays["pairs"].shape[1] > 1 for part in parts)


def log_probs_of(
    model: TrainableModel, adapted: Collection[str], chunk: int | None = None, *, packed: bool
) -> PairLogProbs:
    """Return the log-probabilities of pairs; the arguments are those of `preference_loss`."""
    hidden = model.hidden if packed else lambda params, ids, segments: model.hidden(params, ids)
    if model.head_path in adapted:
        return log_probs_of_trained_head(hidden, model.logits, chunk)
    return log_probs_of_frozen_head(hidden, model.head, chunk, model.finish)


def _dpo(options: TrainOptions) -> PairLoss:
    more = {"kind": options.dpo_loss, "label_smoothing": options.label_smoothing}
    return partial(losses.dpo, beta=_beta(options, 0.1), **more)  # type: ignore[arg-type]


def _cpo(options: TrainOptions) -> PairLoss:
    more = {"label_smoothing": options.label_smoothing}
    return lambda policy, _: losses.cpo(policy, beta=_beta(options, 0.1), **more)


def _beta(options: TrainOptions, default: float) -> float:
    return default if options.beta is None else options.beta


_LOSSES: dict[str, Callable[[TrainOptions], PairLoss]] = {
    DPO: _dpo,
    ORPO: lambda options: lambda policy, _: losses.orpo(policy, beta=_beta(options, 0.1)),
    CPO: _cpo,
    SIMPO: lambda options: (
        lambda policy, _: losses.simpo(policy, beta=_beta(options, 2.0), gamma=options.gamma)
    ),
}
assert set(_LOSSES) == set(PREFERENCES)
