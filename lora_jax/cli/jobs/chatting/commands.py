"""The commands in a conversation: lines that begin with a slash."""

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from lora_jax.cli.jobs.chatting.conversation import Conversation
from lora_jax.cli.jobs.speaker import Speaker
from lora_jax.cli.options import BASE
from lora_jax.core.foreign import shown

EXIT = ("/exit", "/quit")
_NONE = "none"  # the base's other name
_HELP = {
    "/reset": "start a new conversation",
    "/system TEXT": "give the model another system message, or none without TEXT",
    "/adapter NAME": "let another adapter answer; base or none: the model alone",
    "/adapters": "list them",
    "/save FILE": "append the conversation to a .jsonl file, as a row to train on",
    EXIT[0]: "end, as Ctrl-D does",
}
HINT = f"/reset starts again, {EXIT[0]} or Ctrl-D ends, /help lists the other commands."


class Commands:
    """What a line with a slash does to a conversation; it is answered on stderr.

    Args:
      conversation: changed by the commands.
      speakers: of the adapters by name.
      current: the name of the one that speaks.
    """

    def __init__(
        self, conversation: Conversation, speakers: Mapping[str, Speaker], current: str
    ) -> None:
        self._conversation, self._speakers, self._current = conversation, speakers, current
        self._known: Mapping[str, Callable[[str], str]] = {
            "/reset": self._reset,
            "/system": self._system,
            "/adapter": self._adapter,
            "/adapters": self._list,
            "/save": self._save,
            "/help": lambda _: "\n".join(f"{name:<15}{what}" for name, what in _HELP.items()),
        }

    def obey(self, text: str) -> bool:
        """Return whether a line is a command, after doing it; a single unknown word is one."""
        word, _, rest = text.partition(" ")
        if word in self._known:
            said = self._known[word](rest.strip())
        elif re.fullmatch(r"/[a-z]+", text):
            said = f"{shown(text)} is not a command; /help lists them"
        else:
            return False
        if said:
            print(said, file=sys.stderr)
        return True

    def _reset(self, _: str) -> str:
        self._conversation.turns.clear()
        return ""

    def _system(self, text: str) -> str:
        self._conversation.system = text or None
        return ""

    def _adapter(self, name: str) -> str:
        if not name:
            return self._list(name)
        name = BASE if name == _NONE and name not in self._speakers else name
        if name not in self._speakers:
            return f"{shown(name)} is not one of {shown(', '.join(self._speakers))}"
        self._current, self._conversation.speaker = name, self._speakers[name]
        return ""

    def _list(self, _: str) -> str:
        return "\n".join(
            f"{'*' if name == self._current else ' '} {shown(name)}" for name in self._speakers
        )

    def _save(self, name: str) -> str:
        if not name:
            return "give the name of a file: /save chats.jsonl"
        if not any(turn["role"] == "assistant" for turn in self._conversation.turns):
            return "nothing was said yet, so nothing is saved"
        row = json.dumps({"messages": self._conversation.messages}, ensure_ascii=False)
        try:
            with Path(name).expanduser().open("a", encoding="utf-8") as file:
                file.write(f"{row}\n")
        except OSError as error:
            return f"cannot write {shown(name)}: {error.strerror}"
        return f"saved {len(self._conversation.turns)} turns in {shown(name)}"
