"""What `lora-jax generate` does with several prompts or adapters: one batch, a row for each."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lora_jax.cli import classifiers, sources, terminal
from lora_jax.cli.adapter_names import Chosen
from lora_jax.cli.errors import PromptError
from lora_jax.cli.fit import Fit
from lora_jax.cli.jobs.asked_rows import AskedRow, continue_rows
from lora_jax.cli.jobs.generate import encode
from lora_jax.cli.jobs.several_speakers import open_with_stack
from lora_jax.cli.jobs.speaker import CLASSIFIER, open_speaker
from lora_jax.models import stops


@dataclasses.dataclass(frozen=True)
class Row:
    """A prompt, and what continues it."""

    adapter: Chosen
    prompt: str
    asked: AskedRow

    @property
    def label(self) -> str:
        """The line above the text: the adapter and the first line of the prompt."""
        first = self.prompt.strip().partition("\n")[0]
        return f"[{self.adapter.name}] {first}"


def run(
    model: str,
    pairs: Sequence[tuple[Chosen, str]],
    *,
    chat: bool,
    system: str | None,
    seed: int,
    sampling: dict[str, Any],
    stop: Sequence[str],
    max_tokens: int,
    dtype: str | None,
    quantize: str | None,
    fit: Fit,
) -> None:
    """Print what each adapter says to its prompt, in their order.

    Raises:
      PromptError: the model cannot generate text, or a prompt does not fit into it.
      AdapterOptionError: an adapter changes the model, or the adapters do not fit together.
      LoraError: the model, a tokenizer or an adapter cannot be read.
    """
    chosen = [one.path for one, _ in pairs]
    paths = list(dict.fromkeys(path for path in chosen if path is not None))
    base = sources.find_model(model)
    rows = []
    for one, prompt in pairs:
        if named := classifiers.find(base, one.path):
            raise PromptError(f"{named}: {CLASSIFIER}")
        tokenizer = sources.tokenizer_of(base, one.path)
        ids = encode(tokenizer, prompt, chat or system is not None, system)
        ends = sources.stop_ids(base, tokenizer) | stops.special_ids(tokenizer, stop)
        rows.append(Row(one, prompt, AskedRow(ids, tokenizer, ends)))
    options: Any = {"max_tokens": max_tokens, "dtype": dtype, "quantize": quantize, "fit": fit}
    if len(paths) > 1 or (paths and None in chosen):
        speaker = open_with_stack(model, paths, stop=stop, sampling=sampling, **options)
        slots = [-1 if path is None else paths.index(path) for path in chosen]
    else:
        only = paths[0] if paths else None
        speaker = open_speaker(model, only, stop=stop, sampling=sampling, **options)
        slots = None
    texts = continue_rows(speaker, [row.asked for row in rows], slots, seed)
    for row, text in zip(rows, texts, strict=True):
        terminal.write(f"{row.label}\n{text}\n\n")
