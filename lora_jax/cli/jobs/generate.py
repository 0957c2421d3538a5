"""What `lora-jax generate` does: encode a prompt, and print new tokens as they are generated."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_jax.cli import terminal
from lora_jax.cli.jobs.speaker import open_speaker
from lora_jax.models.text.tokenizer import Tokenizer


def run(
    model: str,
    adapter: Path | None,
    prompt: str,
    *,
    chat: bool,
    system: str | None,
    seed: int,
    sampling: dict[str, Any],
    **loading: Any,
) -> None:
    """Print the generated text; the arguments are the command's options.

    Raises:
      PromptError: the model cannot generate text, or the prompt does not fit into it.
      LoraError: the model, its tokenizer or the adapter cannot be read.
    """
    ids: list[int] = []

    def read(tokenizer: Tokenizer) -> None:
        ids.extend(encode(tokenizer, prompt, chat or system is not None, system))

    speaker = open_speaker(model, adapter, encode=read, sampling=sampling, **loading)
    for piece in speaker.speak(ids, seed):
        terminal.write(piece)
    terminal.write("\n")


def encode(tokenizer: Tokenizer, prompt: str, chat: bool, system: str | None) -> Sequence[int]:
    """Return the ids of a prompt, with `chat` as a user's turn behind the system message if any."""
    if not chat:
        return tokenizer.encode_prompt(prompt)
    turns = [{"role": "user", "content": prompt}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    # the template writes out the special tokens
    return tokenizer.encode(tokenizer.chat(turns, add_generation_prompt=True))
