"""The JSON of answers, whole and in pieces, as OpenAI's clients read it."""

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_jax.serving.asked import Asked
from lora_jax.serving.job import Progress
from lora_jax.serving.rows import Sampled

DONE = "data: [DONE]\n\n"


def event(data: Any) -> str:
    """Return an object as one event of a stream.

    >>> event({"a": 1})
    'data: {"a":1}\\n\\n'
    """
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


@dataclass
class Answer:
    """The answer to a request, as it grows.

    Attributes:
      asked: the request.
    """

    asked: Asked
    _id: str = field(init=False)
    _created: int = field(default_factory=lambda: int(time.time()))
    _texts: list[str] = field(init=False)
    _tokens: list[list[Sampled]] = field(init=False)
    _finish: list[str | None] = field(init=False)

    def __post_init__(self) -> None:
        count = self.asked.count
        self._id = ("chatcmpl-" if self.asked.chat else "cmpl-") + secrets.token_hex(12)
        self._texts = [self.asked.echo_of(index) for index in range(count)]
        self._tokens = [[] for _ in range(count)]
        self._finish = [None] * count

    @property
    def done(self) -> bool:
        """Whether all completions have ended."""
        return None not in self._finish

    def add(self, index: int, progress: Progress) -> str:
        """Take what is new in one completion, and return it as events; empty if there is none."""
        start = len(self._texts[index])
        self._texts[index] += progress.text
        self._tokens[index] += progress.tokens
        self._finish[index] = progress.finish
        logprobs = self._logprobs(progress.tokens, start) if self.asked.logprobs else None
        found = ""
        if progress.text or (logprobs and progress.tokens):
            found += self._chunk(index, progress.text, logprobs, None)
        if progress.finish:
            found += self._chunk(index, "", None, progress.finish)
        return found

    def opening(self) -> str:
        """Return the events before the first token: the role of a message, the prompt's echo."""
        found = ""
        for index, text in enumerate(self._texts):
            said: dict[str, Any] = {"text": text}
            if self.asked.chat:
                said = {"delta": {"role": "assistant", "content": ""}}
            if self.asked.chat or text:
                choice = {"index": index, **said, "logprobs": None, "finish_reason": None}
                found += event(self._object([choice], piece=True))
        return found

    def closing(self) -> str:
        """Return the last events."""
        if not self.asked.usage:
            return DONE
        return event(self._object([], piece=True) | {"usage": self._usage()}) + DONE

    def whole(self) -> dict[str, Any]:
        """Return the answer as one object."""
        choices = []
        for index, text in enumerate(self._texts):
            tokens = self._tokens[index]
            logprobs = self._logprobs(tokens, 0) if self.asked.logprobs else None
            said: dict[str, Any] = {"text": text}
            if self.asked.chat:
                said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            end = {"logprobs": logprobs, "finish_reason": self._finish[index]}
            choices.append({"index": index, **said, **end})
        return self._object(choices, piece=False) | {"usage": self._usage()}

    def _chunk(self, index: int, text: str, logprobs: Any, finish: str | None) -> str:
        said: dict[str, Any] = {"text": text}
        if self.asked.chat:
            said = {"delta": {"content": text} if text or not finish else {}}
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}
        return event(self._object([choice], piece=True))

    def _object(self, choices: list[dict[str, Any]], piece: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self.asked.chat:
            kind = "chat.completion.chunk" if piece else "chat.completion"
        head = {"id": self._id, "object": kind, "created": self._created}
        return {**head, "model": self.asked.served.name, "choices": choices}

    def _usage(self) -> dict[str, int]:
        prompt, made = sum(map(len, self.asked.prompts)), sum(map(len, self._tokens))
        counts = {"prompt_tokens": prompt, "completion_tokens": made}
        return {**counts, "total_tokens": prompt + made}

    def _logprobs(self, tokens: Sequence[Sampled], start: int) -> dict[str, Any]:
        """Return the log-probabilities of tokens, the first of which begins at a character."""
        told = [self._told(x.token, x.logprob) for x in tokens]
        tops = [[self._told(i, value) for i, value in x.top] for x in tokens]
        if self.asked.chat:
            paired = zip(told, tops, strict=True)
            return {"content": [{**one, "top_logprobs": top} for one, top in paired]}
        offsets = [start]
        for one in told:
            offsets.append(offsets[-1] + len(one["token"]))
        return {
            "tokens": [x["token"] for x in told],
            "token_logprobs": [x["logprob"] for x in told],
            "top_logprobs": [{x["token"]: x["logprob"] for x in top} for top in tops],
            "text_offset": offsets[:-1],
        }

    def _told(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.asked.served.tokenizer.decode([token], special=True)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
