"""What `lora-jax chat` does: a conversation in turns, each answer printed as it is generated."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_jax.cli import terminal
from lora_jax.cli.errors import PromptError
from lora_jax.cli.jobs.chatting.commands import EXIT, HINT, Commands
from lora_jax.cli.jobs.chatting.conversation import Conversation
from lora_jax.cli.jobs.several_speakers import open_speakers
from lora_jax.core.errors import ChatTemplateError


def run(
    model: str,
    named: Mapping[str, Path],
    *,
    system: str | None,
    seed: int,
    sampling: dict[str, Any],
    **loading: Any,
) -> None:
    """Answer the lines of standard input; the arguments are the command's options.

    Args:
      named: adapters by name, of which the first one speaks at first.

    Raises:
      LoraError: the model, a tokenizer or an adapter cannot be read, or the model has no chat
        template.
    """

    def check(tokenizer: Any) -> None:
        opening = [] if system is None else [{"role": "system", "content": system}]
        tokenizer.chat([*opening, {"role": "user", "content": "Hello"}], add_generation_prompt=True)

    speakers = open_speakers(model, named, encode=check, sampling=sampling, **loading)
    first = next(iter(speakers))
    conversation = Conversation(speakers[first], system)
    commands = Commands(conversation, speakers, first)
    for number, line in enumerate(_lines()):
        text = line.strip()
        if text in EXIT:
            return
        if text and not commands.obey(text):
            _reply(conversation, text, seed + number)


def _reply(conversation: Conversation, text: str, seed: int) -> None:
    """Print an answer; Ctrl-C ends it and not the conversation, where someone types."""
    try:
        with contextlib.closing(conversation.answer(text, seed)) as pieces:
            for piece in pieces:
                terminal.write(piece)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    except (PromptError, ChatTemplateError) as error:
        if not sys.stdin.isatty():
            raise
        print(f"error: {error}", file=sys.stderr)
    terminal.write("\n")


def _lines() -> Iterator[str]:
    """Yield what the user types, after a prompt in a terminal, up to the end of the input."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - editing and a history of lines
    print(HINT, file=sys.stderr)
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ")
    print()
