"""What was said in a conversation, and what is answered."""

import sys
from collections.abc import Generator
from dataclasses import dataclass, field

from lora_jax.cli.jobs.speaker import Speaker

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
            ids = self.speaker.encode_chat(self.messages)
            if len(ids) <= most or len(self.turns) == 1:
                return ids
            del self.turns[:2]
            print(
                "note: the conversation is too long; its oldest turns are left out", file=sys.stderr
            )

    @property
    def messages(self) -> list[dict[str, str]]:
        """The system message, if any, and the turns."""
        return [*self._opening(), *self.turns]

    def _opening(self) -> list[dict[str, str]]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _padded(self, count: int) -> int:
        """Return the length to pad to, a power of two if it leaves room for the answer."""
        length = _SHORTEST
        while length < count:
            length *= 2
        longest = self.speaker.model.config.max_position_embeddings
        return length if length + self.speaker.max_tokens <= longest else count
