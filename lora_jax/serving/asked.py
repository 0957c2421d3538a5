"""`Asked`: what a request for a completion asks for, checked and encoded."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_jax.core.checks import is_integer
from lora_jax.core.errors import LoraError
from lora_jax.core.foreign import shown
from lora_jax.serving.errors import RequestError
from lora_jax.serving.fields import Fields, wrong
from lora_jax.serving.job import Job, Progress
from lora_jax.serving.messages import read_messages
from lora_jax.serving.row_sampling import MOST_TOP
from lora_jax.serving.rows import Choosing
from lora_jax.serving.served import Served

MOST_STOPS, MOST_PROMPTS = 16, 64
_DEFAULT_TOKENS = 16  # of a text completion, as OpenAI's; a chat's answer may fill the context
_HIGHEST_TEMPERATURE = 2.0
_LOWEST_TOP_P = 1e-9
_LARGEST = 2**63 - 1

_BOTH = ("model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options")
_BOTH_AND = (*_BOTH, "logprobs")
TEXT_FIELDS = (*_BOTH_AND, "prompt")
CHAT_FIELDS = (*_BOTH_AND, "messages", "max_completion_tokens", "top_logprobs")
# These change nothing in a text.
_INERT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# Only these values of them are what a server without them does.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


@dataclass(frozen=True)
class Asked:
    """A request for completions.

    Attributes:
      served: the adapter.
      chat: whether the answer is a message, and not a text.
      prompts: token ids, one list per completion.
      most: maximum number of tokens of each.
      choosing: how they are chosen.
      stops: texts that end a text.
      stream: whether the answer is sent in pieces.
      usage: whether the last piece tells how many tokens there were.
      logprobs: whether log-probabilities are told.
    """

    served: Served
    chat: bool
    prompts: list[list[int]]
    most: list[int]
    choosing: Choosing
    stops: tuple[str, ...]
    stream: bool
    usage: bool
    logprobs: bool

    def jobs(self, report: Callable[[int, Progress], None]) -> list[Job]:
        """Return a job per completion, which report under their numbers."""

        def job(index: int) -> Job:
            return Job(
                self.served,
                self.prompts[index],
                self.most[index],
                self.choosing,
                self.stops,
                lambda progress: report(index, progress),
            )

        return [job(index) for index in range(len(self.prompts))]


@dataclass(frozen=True)
class Reader:
    """What requests are checked against.

    Attributes:
      find: a name -> what is served under it; raises `RequestError`.
      context: maximum number of tokens, prompt and completion together.
      vocabulary: the number of ids that the model has.
    """

    find: Callable[[str], Served]
    context: int
    vocabulary: int

    def read(self, body: bytes, chat: bool) -> Asked:
        """Read a request; encoding its prompt can take a while.

        Raises:
          RequestError: a field is wrong, or the prompt is too long.
        """
        fields = Fields(body)
        fields.refuse_values(_NEUTRAL)
        known = CHAT_FIELDS if chat else TEXT_FIELDS
        fields.refuse_others(known, (*_INERT, *_NEUTRAL))
        served = self.find(fields.text("model"))
        stream = fields.flag("stream")
        usage = _read_stream_options(fields, stream)
        logprobs, top = _read_logprobs(fields, chat)
        seed = fields.integer("seed", -_LARGEST - 1, _LARGEST, None)
        choosing = Choosing(
            temperature=fields.number("temperature", 0, _HIGHEST_TEMPERATURE, 1.0),
            top_p=max(_LOWEST_TOP_P, fields.number("top_p", 0, 1, 1.0)),
            seed=secrets.randbits(31) if seed is None else seed,
            top=top,
        )
        stops = fields.texts("stop", MOST_STOPS)
        limit = _read_limit(fields, chat)
        encode = _encode_chat if chat else _encode_texts
        prompts = encode(fields, served)
        most = [self._room(served, ids, limit) for ids in prompts]
        return Asked(served, chat, prompts, most, choosing, stops, stream, usage, logprobs)

    def _room(self, served: Served, ids: Sequence[int], limit: int | None) -> int:
        """Return how many tokens may follow a prompt."""
        if not ids:
            raise RequestError("the prompt has no tokens; give some text to continue")
        if not 0 <= min(ids) <= max(ids) < self.vocabulary:
            raise RequestError(
                f"the prompt has a token outside of the vocabulary, whose ids are 0 to "
                f"{self.vocabulary - 1}",
                param="prompt",
            )
        wanted = 1 if limit is None else limit
        if len(ids) + wanted > self.context:
            raise RequestError(
                f"this model's maximum context length is {self.context} tokens, but the request "
                f"has {len(ids) + wanted}: {len(ids)} in the prompt and {wanted} for the "
                "completion; shorten the prompt or the completion",
                param="messages" if limit is None else None,
                code="context_length_exceeded",
            )
        return self.context - len(ids) if limit is None else limit


def _read_limit(fields: Fields, chat: bool) -> int | None:
    """Return the maximum number of tokens, None for what fits."""
    names = ["max_completion_tokens", "max_tokens"] if chat else ["max_tokens"]
    given = [x for name in names if (x := fields.integer(name, 1, _LARGEST, None)) is not None]
    if len(set(given)) > 1:
        raise RequestError(
            f"max_completion_tokens is {given[0]} and max_tokens is {given[1]}; give one of them",
            param="max_tokens",
        )
    return given[0] if given else None if chat else _DEFAULT_TOKENS


def _read_stream_options(fields: Fields, stream: bool) -> bool:
    options = fields.value("stream_options")
    if options is None:
        return False
    if not stream:
        raise RequestError("stream_options needs stream to be true", param="stream_options")
    known = {"include_usage", "include_obfuscation"}
    if not isinstance(options, dict) or not options.keys() <= known:
        raise wrong("stream_options", 'an object such as {"include_usage": true}', options)
    value = options.get("include_usage", False)
    if not isinstance(value, bool):
        raise wrong("stream_options.include_usage", "true or false", value)
    return value


def _read_logprobs(fields: Fields, chat: bool) -> tuple[bool, int]:
    """Return whether log-probabilities are told, and of how many other tokens."""
    if not chat:
        top = fields.integer("logprobs", 0, MOST_TOP, None)
        return top is not None, top or 0
    wanted = fields.flag("logprobs")
    top = fields.integer("top_logprobs", 0, MOST_TOP, None)
    if top is not None and not wanted:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    return wanted, top or 0


def _encode_chat(fields: Fields, served: Served) -> list[list[int]]:
    messages = read_messages(fields.value("messages"))

    def encode(tokenizer: Any) -> list[int]:
        # the template writes out the special tokens
        return tokenizer.encode(tokenizer.chat(messages, add_generation_prompt=True))

    return [_encoded("messages", encode, served)]


def _encode_texts(fields: Fields, served: Served) -> list[list[int]]:
    given = fields.value("prompt")
    prompts = given if isinstance(given, list) and not _is_ids(given) else [given]
    if not prompts or len(prompts) > MOST_PROMPTS:
        raise wrong("prompt", f"a text, token ids, or a list of up to {MOST_PROMPTS}", given)

    def one(prompt: Any) -> list[int]:
        if _is_ids(prompt):
            return prompt
        if not isinstance(prompt, str):
            raise wrong("prompt", "a text, token ids, or a list of these", prompt)
        return _encoded("prompt", lambda tokenizer: tokenizer.encode_prompt(prompt), served)

    return [one(prompt) for prompt in prompts]


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_integer, value))


def _encoded(name: str, encode: Callable[[Any], list[int]], served: Served) -> list[int]:
    try:
        return encode(served.tokenizer)
    except (LoraError, UnicodeError) as error:
        said = shown(error)
        raise RequestError(f"{name} cannot be encoded for {served.name}: {said}", param=name) from (
            None
        )
