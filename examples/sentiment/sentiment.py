"""The run: probe a frozen encoder, fine-tune it with LoRA, save, reload, merge, compare."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import lora_jax as lora
from examples.sentiment import probe
from examples.sentiment.report import Report
from examples.sentiment.reviews import LABELS
from lora_jax import models, training
from lora_jax.models.text import Tokenizer
from lora_jax.training import log, loss_curve, progress

# Float32 sums taken in another order; a prediction can differ only where the logits all but tie.
TOLERANCE = 1e-3


class DisagreementError(RuntimeError):
    """Two forms of the same adapted model give different outputs."""


@dataclass(frozen=True)
class Recipe:
    """Sizes and rates of a run; the defaults were chosen on a part of the training data."""

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
        """Return a linear warm-up over a tenth of the steps, then a cosine decay to zero."""
        warmup = max(1, self.steps // 10)
        return optax.warmup_cosine_decay_schedule(0, self.learning_rate, warmup, self.steps)

    def lora_config(self) -> lora.LoraConfig:
        """Return LoRA on the query and value kernels, with the head fully trained."""
        return lora.LoraConfig(
            rank=self.rank,
            alpha=self.alpha,
            targets=["query/kernel", "value/kernel"],
            train=["head/kernel", "head/bias"],
        )


@dataclass(frozen=True)
class PackedReviews:
    """Reviews to train on or to test on, packed."""

    texts: training.Data
    labels: np.ndarray  # int32 [n]

    def accuracy(self, logits: np.ndarray) -> float:
        """Return the share of `logits` `[n, classes]` that are highest at the label."""
        return float(np.mean(logits.argmax(axis=-1) == self.labels))

    def first(self, rows: int) -> tuple[training.Data, np.ndarray]:
        """Return the first `rows` rows, and which texts are in them, ascending."""
        part = self.texts.first(rows)
        return part, np.sort(part.arrays["source"][part.arrays["weights"] > 0])


@dataclass(frozen=True)
class Scores:
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
        """Return names and values for the table."""
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
    recipe: Recipe,
    encoder: Path,
    train: training.Rows,
    held_out: training.Rows,
    out: Path,
    report: Report,
) -> Scores:
    """Fine-tune an encoder on `train` and measure it on `held_out`.

    Args:
      recipe: sizes and rates, and the seed.
      encoder: directory with `config.json`, `model.safetensors` and `tokenizer.json`.
      train: reviews to train on.
      held_out: reviews that nothing is chosen or fitted on.
      out: directory for `adapter.safetensors` and `loss.png`; created if missing.
      report: where progress goes.

    Raises:
      DisagreementError: the adapted, the reloaded and the merged model do not agree.
      TrainingError: the loss is not finite.
    """
    out.mkdir(parents=True, exist_ok=True)
    with report.phase("load"):
        model, params = load(encoder, recipe)
        train_part, held_part = (pack(rows, encoder, recipe) for rows in (train, held_out))

    with report.phase("probe"):
        probed = score_probe(model, params, recipe, train_part, held_part, report)

    with report.phase("train"):
        config = recipe.lora_config()
        rows = jax.ShapeDtypeStruct((recipe.rows, recipe.length), np.int32)
        params = lora.init(jax.random.key(recipe.seed), params, config, model, rows, rows)
        report.say(lora.summary(params))
        trained = lora.count_params(params).trainable
        base, adapters = lora.split(params)
        outcome = fine_tune(recipe, model, base, adapters, train_part, report)
        loss_curve.draw(outcome.records, out / "loss.png")
        report.wrote(out / "loss.png")

    predict = partial(training.predict, jax.jit(lora.lora(model)), rows=recipe.predict_rows)
    with report.phase("evaluate"):
        watch = progress.track(report.console, "held-out, adapted")
        adapted = predict(lora.join(base, outcome.adapters), held_part.texts, watch=watch)

    with report.phase("save, reload, merge"):
        file = out / "adapter.safetensors"
        reloaded = lora.join(base, save_and_reload(file, base, outcome.adapters, config))
        report.wrote(file)
        # The same bits through the same program: a part of the texts will do.
        part, texts = held_part.first(2 * recipe.predict_rows)
        compare("reloaded", adapted[texts], predict(reloaded, part))
        watch = progress.track(report.console, "held-out, merged")
        merged = predict(lora.merge(reloaded), held_part.texts, watch=watch)
        difference, flips = compare("merged", adapted, merged)

    return Scores(
        majority=float(np.bincount(held_part.labels).max() / len(held_out)),
        probe=probed,
        adapted=held_part.accuracy(adapted),
        merged=held_part.accuracy(merged),
        difference=difference,
        flips=flips,
        trained=trained,
        losses=tuple(log.losses(outcome.records)[1]),
    )


def load(encoder: Path, recipe: Recipe) -> tuple[training.Classifier, Any]:
    """Return a classifier and its parameters: a pretrained encoder under a new head."""
    pretrained = models.load(encoder)
    return training.with_head(
        pretrained.apply,
        pretrained.params,
        pretrained.config.hidden_size,
        len(LABELS),
        recipe.slots,
        recipe.seed,
        jax.nn.initializers.lecun_normal(),
    )


def pack(reviews: training.Rows, encoder: Path, recipe: Recipe) -> PackedReviews:
    """Return reviews as packed token ids, with their labels."""
    tokenizer = Tokenizer.load(encoder)
    encoded = training.encode_labelled(reviews, tokenizer, LABELS, recipe.length)
    return PackedReviews(
        training.pack_texts(encoded.texts, recipe.length, recipe.slots), encoded.labels
    )


def score_probe(
    model: training.Classifier,
    params: Any,
    recipe: Recipe,
    train: PackedReviews,
    held_out: PackedReviews,
    report: Report,
) -> float:
    """Return the held-out accuracy of a linear probe on the frozen encoder's embeddings."""
    embed = partial(training.predict, jax.jit(model.embed), params, rows=recipe.predict_rows)
    bar: Callable[[str], Any] = partial(progress.track, report.console)
    features = embed(train.texts, watch=bar("embeddings, train"))
    chosen = probe.fit_best(features, train.labels)
    unseen = embed(held_out.texts, watch=bar("embeddings, held-out"))
    return chosen.accuracy(unseen, held_out.labels)


def fine_tune(
    recipe: Recipe,
    model: training.Classifier,
    base: Any,
    adapters: Any,
    part: PackedReviews,
    report: Report,
) -> training.Outcome:
    """Train adapters in the split form: no gradient is computed for the base.

    Args:
      recipe: sizes and rates.
      model: the classifier, without `lora`.
      base: its parameters.
      adapters: what to train, as `lora.split` gives it; it is left as it is.
      part: what to train on.
      report: where progress goes.

    Returns:
      The trained adapters and the log.

    Raises:
      TrainingError: the loss is not finite.
    """
    job = training.Job(
        loss=training.class_sums(model),
        base=base,
        tx=lora.freeze(optax.adam(recipe.schedule()), adapters),
        data=training.add_labels(part.texts, part.labels),
        settings=training.Settings(recipe.steps, recipe.rows, seed=recipe.seed),
    )
    with progress.bar(report.console, recipe.steps) as show:
        return training.train(job, adapters, training.Watcher(step=show))


def save_and_reload(file: Path, base: Any, adapters: Any, config: lora.LoraConfig) -> Any:
    """Save adapters and load them again: the same ones, or `DisagreementError`."""
    lora.save(file, adapters, {"task": "movie review sentiment"}, base=base, config=config)
    reloaded = lora.load(file, base)
    check_reloaded(adapters, reloaded)
    return reloaded


def check_reloaded(trained: Any, reloaded: Any) -> None:
    """Raise `DisagreementError` unless every leaf in the file equals the trained one to the bit."""
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
    """Compare the adapted model's outputs with those of model `name`, both `[n, classes]`.

    Returns:
      Their largest difference, and the number of predictions that differ.

    Raises:
      DisagreementError: the difference is above `TOLERANCE` of the largest logit, or is not a
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
