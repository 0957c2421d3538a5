"""What `lora-jax eval` does: figures of a language model or a classifier on files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_jax.cli import classifiers, sources
from lora_jax.cli.adapter_names import Chosen
from lora_jax.cli.errors import AdapterOptionError
from lora_jax.cli.fit import Fit
from lora_jax.cli.jobs.evaluating.choices import choices, preferences
from lora_jax.cli.jobs.evaluating.classifier import classifier_figures
from lora_jax.cli.jobs.evaluating.exact_match import check, exact_match
from lora_jax.cli.jobs.evaluating.language_model import perplexity
from lora_jax.cli.jobs.evaluating.report import show
from lora_jax.cli.jobs.evaluating.subject import Notes, Settings, Subject, subjects
from lora_jax.training.dataset import Rows, read_rows
from lora_jax.training.errors import DataError
from lora_jax.training.evaluation.choices import KIND as CHOICE
from lora_jax.training.preference.pairs import KIND as PREFERENCE
from lora_jax.training.rows.arrow import HELD_OUT
from lora_jax.training.streaming.files import find_files

Measure = Callable[[Sequence[Rows], Subject, Settings, Notes], dict[str, Any]]
_MEASURES: dict[str, Measure] = {CHOICE: choices, PREFERENCE: preferences}  # of kinds of rows


def run(
    model: str,
    adapters: Sequence[Chosen],
    files: Sequence[Path],
    settings: Settings,
    *,
    encoding: str,
    as_json: bool,
    dtype: str | None,
    fit: Fit,
) -> None:
    """Print what was measured; the arguments are the command's options.

    Args:
      adapters: one or several; one without a path is the model alone.

    Raises:
      DataError: a file cannot be read or has rows of another kind.
      LoraError: the model or an adapter cannot be read.
    """
    rows = [read_rows(path, encoding) for path in find_files(files, HELD_OUT)]
    if settings.exact:
        check(rows)
    base = sources.find_model(model)
    sources.require_kind(base, "encoder", "decoder")
    paths = [one.path for one in adapters]
    named = [classifiers.find(base, path) for path in paths]
    if any(named):
        if not all(named):
            raise AdapterOptionError(
                "--adapter: classifiers and other adapters cannot be measured on the same data; "
                "give them in two commands"
            )
        found = [classifier_figures(rows, model, x, settings, dtype, fit) for x in paths]
    else:
        notes = Notes()
        found = [
            _measure(rows, subject, settings, notes)
            for subject in subjects(base, paths, dtype, fit, settings.quantize)
        ]
    show([one.name for one in adapters], found, as_json)


def _measure(
    rows: Sequence[Rows], subject: Subject, settings: Settings, notes: Notes
) -> dict[str, Any]:
    measures = {_MEASURES.get(part.kind, perplexity): part for part in rows}
    if len(measures) > 1:
        named = ", ".join(f"{part.source} contains {part.kind} rows" for part in measures.values())
        raise DataError(f"files of several kinds: {named}; give files of one kind")
    (measure,) = measures
    found = measure(rows, subject, settings, notes)
    return found | (exact_match(rows, subject, settings) if settings.exact else {})
