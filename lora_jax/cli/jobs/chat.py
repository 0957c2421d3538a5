"""What `lora-jax chat` does: a conversation in turns, each answer printed as it is generated."""

import contextlib
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_jax.cli import terminal
from lora_jax.cli.errors import PromptError
from lora_jax.cli.jobs.speaker import Speaker, open_speaker
from lora_jax.core.errors import ChatTemplateError

EXIT, RESET = ("/exit", "/quit"), "/reset"
_SHORTEST = 64  # tokens to which a conversation is padded at least
_KEPT_FREE = 4  # part of the positions that is left for the answer


@dataclass
class Conversation:
    """What has been said so far.

    Attributes:
      speaker: who answers.
      system: the system message, or None.
      turns: of the user and the assistant, in turn.
    """

    speaker: Speaker
    system: str | None
    turns: list[dict[str, str]] = field(default_factory=list)

    def answer(self, text: str, seed: int) -> Generator[str, None, None]:
        """Yield the pieces of the answer to a message; what was yielded is remembered.

        Raises:
          PromptError: the message alone does not fit into the model.
          ChatTemplateError: the model has no chat template, or it refuses the conversation.
        """
        self.turns.append({"role": "user", "content": text})
        said: list[str] = []
        try:
            ids = self._encode()
            for piece in self.speaker.speak(ids, seed, self._padded(len(ids))):
                said.append(piece)
                yield piece
        finally:
            if said:
                self.turns.append({"role": "assistant", "content": "".join(said)})
            else:  # two turns of the user in a row would confuse the template
                self.turns.pop()

    def _encode(self) -> list[int]:
        """Return the ids of the conversation, without its oldest turns if it is too long."""
        longest = self.speaker.model.config.max_position_embeddings
        most = longest - min(self.speaker.max_tokens, longest // _KEPT_FREE)
        while True:
            ids = self.speaker.encode_chat([*self._opening(), *self.turns])
            if len(ids) <= most or len(self.turns) == 1:
                return ids
            del self.turns[:2]
            print(
                "note: the conversation is too long; its oldest turns are left out", file=sys.stderr
            )

    def _opening(self) -> list[dict[str, str]]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _padded(self, count: int) -> int:
        """Return the length to pad to, a power of two if it leaves room for the answer."""
        length = _SHORTEST
        while length < count:
            length *= 2
        longest = self.speaker.model.config.max_position_embeddings
        return length if length + self.speaker.max_tokens <= longest else count


def run(
    model: str,
    adapter: Path | None,
    *,
    system: str | None,
    seed: int,
    sampling: dict[str, Any],
    **loading: Any,
) -> None:
    """Answer the lines of standard input; the arguments are the command's options.

    Raises:
      LoraError: the model, its tokenizer or the adapter cannot be read, or the model has no chat
        template.
    """

    def check(tokenizer: Any) -> None:
        opening = [] if system is None else [{"role": "system", "content": system}]
        tokenizer.chat([*opening, {"role": "user", "content": "Hello"}], add_generation_prompt=True)

    speaker = open_speaker(model, adapter, encode=check, sampling=sampling, **loading)
    conversation = Conversation(speaker, system)
    for number, line in enumerate(_lines()):
        text = line.strip()
        if text in EXIT:
            return
        if text == RESET:
            conversation.turns.clear()
        elif text:
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
    print(f"{RESET} starts again, {EXIT[0]} or Ctrl-D ends.", file=sys.stderr)
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ")
    print()
