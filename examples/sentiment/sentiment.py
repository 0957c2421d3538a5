"""The demo's run: probe a frozen encoder, fine-tune it with LoRA, save, reload, merge, compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import lora_jax as lora
from examples.sentiment import classifier, probe
from examples.sentiment.report import Report
from examples.sentiment.reviews import Reviews, tokenize
from lora_jax import models
from lora_jax.models.bert import Bert
from lora_jax.training.packing import Packed, pack, shuffled_batches

# Float32 sums taken in another order; a prediction can differ only where the logits all but tie.
TOLERANCE = 1e-3


class DisagreementError(RuntimeError):
    """Two forms of the same adapted model give different outputs."""


@dataclass(frozen=True)
class Settings:
    """What a run can be asked to do; the defaults were chosen on a part of the training data."""

    steps: int = 160
    rank: int = 8
    alpha: float = 16
    seed: int = 0
    learning_rate: float = 3e-3
    rows: int = 10  # packed rows in a training batch: some 23 reviews
    length: int = 64  # tokens a row holds; a longer review is cut
    slots: int = 8  # reviews a row holds at most
    predict_rows: int = 16  # packed rows in a batch without gradients

    def schedule(self) -> optax.Schedule:
        """Linear warm-up over a tenth of the steps, then a cosine down to zero."""
        warmup = max(1, self.steps // 10)
        return optax.warmup_cosine_decay_schedule(0, self.learning_rate, warmup, self.steps)

    def lora_config(self) -> lora.LoraConfig:
        """LoRA on query and value kernels, the head trained whole."""
        return lora.LoraConfig(
            rank=self.rank,
            alpha=self.alpha,
            targets=["query/kernel", "value/kernel"],
            train=["head/kernel", "head/bias"],
        )


@dataclass(frozen=True)
class Data:
    """One part of the data, packed."""

    packed: Packed
    labels: np.ndarray  # int32 [n]

    def accuracy(self, logits: np.ndarray) -> float:
        """Share of `logits` `[n, classes]` that are highest at the label."""
        return float(np.mean(logits.argmax(axis=-1) == self.labels))

    def first(self, rows: int) -> tuple[Packed, np.ndarray]:
        """The first `rows` rows, and which texts are in them, ascending."""
        part = self.packed.take(np.arange(min(rows, len(self.packed))))
        return part, np.sort(part.source[part.source >= 0])


@dataclass(frozen=True)
class Outcome:
    """What a run measured."""

    majority: float
    probe: float
    adapted: float
    merged: float
    difference: float  # largest difference between the adapted and the merged model's logits
    flips: int  # predictions in which they differ
    trained: int  # parameters
    losses: tuple[float, ...] = field(repr=False)

    def rows(self) -> list[tuple[str, str]]:
        """Names and values for the table."""
        return [
            ("always the majority", f"{self.majority:.1%}"),
            ("linear probe, frozen encoder", f"{self.probe:.1%}"),
            ("LoRA and head", f"{self.adapted:.1%}"),
            ("reloaded and merged", f"{self.merged:.1%}"),
            ("logits: merged - adapted", f"{self.difference:.1e}"),
            ("predictions that differ", f"{self.flips}"),
            ("trained parameters", f"{self.trained:,}"),
        ]


def run(
    settings: Settings, encoder: Path, train: Reviews, held_out: Reviews, out: Path, report: Report
) -> Outcome:
    """Fine-tunes an encoder on `train` and measures it on `held_out`.

    Args:
      settings: sizes and rates, and the seed.
      encoder: directory with `config.json`, `model.safetensors` and `tokenizer.json`.
      train: reviews to train on.
      held_out: reviews that nothing is chosen or fitted on.
      out: directory for `adapter.safetensors` and `loss.png`; made if need be.
      report: where progress goes.

    Raises:
      DisagreementError: when the adapted, the reloaded and the merged model do not agree.
      FloatingPointError: when the loss is not finite.
    """
    with report.phase("load"):
        pretrained = models.load(encoder)
        model, encoder_params = pretrained.module, pretrained.params
        assert isinstance(model, Bert), f"{encoder} holds no BERT"
        train_data, held_data = (_data(part, encoder, settings) for part in (train, held_out))
        apply, params = classifier.build(model, encoder_params, settings.slots, settings.seed)
        forward = jax.jit(lora.lora(apply))
        predict = partial(classifier.predict, forward, size=settings.predict_rows)

    with report.phase("probe"):
        probed = _probe(predict, params, train_data, held_data, report)

    with report.phase("train"):
        config = settings.lora_config()
        rows = jax.ShapeDtypeStruct((settings.rows, settings.length), np.int32)
        params = lora.init(jax.random.key(settings.seed), params, config, apply, rows, rows)
        trained = lora.count_params(params).trainable
        report.say(lora.summary(params))
        base, adapters = lora.split(params)
        adapters, losses = fine_tune(settings, apply, base, adapters, train_data, report)
        report.loss_curve(losses, out / "loss.png")

    with report.phase("evaluate"):
        watch = report.watch("held-out, adapted")
        adapted = predict(lora.join(base, adapters), held_data.packed, watch=watch)[1]

    with report.phase("save, reload, merge"):
        file = out / "adapter.safetensors"
        reloaded = lora.join(base, save_and_reload(file, base, adapters, config))
        report.wrote(file)
        # The same bits through the same program: a part of the texts will do.
        part, texts = held_data.first(2 * settings.predict_rows)
        compare("reloaded", adapted[texts], predict(reloaded, part)[1])
        watch = report.watch("held-out, merged")
        merged = predict(lora.merge(reloaded), held_data.packed, watch=watch)[1]
        difference, flips = compare("merged", adapted, merged)

    return Outcome(
        majority=float(np.bincount(held_out.labels).max() / len(held_out)),
        probe=probed,
        adapted=held_data.accuracy(adapted),
        merged=held_data.accuracy(merged),
        difference=difference,
        flips=flips,
        trained=trained,
        losses=losses,
    )


def _data(reviews: Reviews, encoder: Path, settings: Settings) -> Data:
    tokens = tokenize(reviews.texts, encoder / "tokenizer.json", settings.length)
    return Data(pack(tokens, settings.length, settings.slots), reviews.labels)


def _probe(predict: Callable, params: Any, train: Data, held_out: Data, report: Report) -> float:
    """Held-out accuracy of a linear probe on the frozen encoder's embeddings."""
    features = predict(params, train.packed, watch=report.watch("embeddings, train"))[0]
    chosen = probe.choose(features, train.labels)
    unseen = predict(params, held_out.packed, watch=report.watch("embeddings, held-out"))[0]
    return chosen.accuracy(unseen, held_out.labels)


def fine_tune(
    settings: Settings,
    apply: classifier.Apply,
    base: Any,
    adapters: Any,
    data: Data,
    report: Report,
) -> tuple[Any, tuple[float, ...]]:
    """Trains adapters in the split form; the base is an input that no gradient is taken of.

    Args:
      settings: sizes and rates.
      apply: the classifier's function, as it was before `lora`.
      base: its parameters.
      adapters: the overlay to train; its arrays are donated.
      data: what to train on.
      report: where progress goes.

    Returns:
      The trained adapters and the loss of each step.

    Raises:
      FloatingPointError: when the loss is not finite.
    """
    adapted_apply = lora.lora(apply)
    tx = lora.freeze(optax.adam(settings.schedule()), adapters)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(adapters, state, base, ids, segments, labels):
        def loss(adapters):
            logits = adapted_apply(lora.join(base, adapters), ids, segments)[1]
            return classifier.cross_entropy(logits, labels)

        value, gradient = jax.value_and_grad(loss)(adapters)
        updates, state = tx.update(gradient, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    state = tx.init(adapters)
    size = min(settings.rows, len(data.packed))
    stream = shuffled_batches(data.packed, size, settings.seed)
    losses: list[float] = []
    with report.loss_bar(settings.steps) as advance:
        for _, batch in zip(range(settings.steps), stream, strict=False):
            labels = np.where(batch.source >= 0, data.labels[batch.source], -1)
            adapters, state, value = step(adapters, state, base, batch.ids, batch.segments, labels)
            losses.append(float(value))
            if not np.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss is {losses[-1]} at step {len(losses)}")
            advance(losses[-1])
    return adapters, tuple(losses)


def save_and_reload(file: Path, base: Any, adapters: Any, config: lora.LoraConfig) -> Any:
    """Writes adapters to a file and reads them back: the same ones, or `DisagreementError`."""
    lora.save(file, adapters, {"task": "movie review sentiment"}, base=base, config=config)
    reloaded = lora.load(file, base)
    check_reloaded(adapters, reloaded)
    return reloaded


def check_reloaded(trained: Any, reloaded: Any) -> None:
    """Raises `DisagreementError` unless every leaf came back from the file to the bit."""
    differing = [
        jax.tree_util.keystr(path)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(trained), jax.tree.leaves(reloaded), strict=True
        )
        if not np.array_equal(a, b)
    ]
    if differing:
        raise DisagreementError(f"reloaded adapters differ from the trained ones: {differing}")


def compare(name: str, logits: np.ndarray, others: np.ndarray) -> tuple[float, int]:
    """The adapted model's outputs and those of model `name`, both `[n, classes]`.

    Returns:
      Their largest difference, and the number of predictions that differ.

    Raises:
      DisagreementError: when the difference is above `TOLERANCE` of the largest logit, or not a
        number.
    """
    difference = float(np.abs(logits - others).max())
    flips = int(np.sum(logits.argmax(axis=-1) != others.argmax(axis=-1)))
    if not difference <= TOLERANCE * np.abs(logits).max():
        raise DisagreementError(
            f"{name} and adapted logits differ by up to {difference:.2e} "
            f"({flips} of {len(logits)} predictions)"
        )
    return difference, flips
