"""`Asked`: what a request for a completion asks for, checked and encoded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_jax.core.checks import is_integer
from lora_jax.core.errors import LoraError
from lora_jax.core.foreign import shown
from lora_jax.serving.choosing import Choosing
from lora_jax.serving.choosing_fields import CHOOSING_FIELDS, read_choosing, with_seed
from lora_jax.serving.errors import RequestError
from lora_jax.serving.fields import LARGEST, Fields, wrong
from lora_jax.serving.job import Job, Progress
from lora_jax.serving.messages import read_messages
from lora_jax.serving.row_sampling import MOST_TOP
from lora_jax.serving.served import Served

MOST_STOPS, MOST_PROMPTS, MOST_CHOICES = 16, 64, 128
_DEFAULT_TOKENS = 16  # of a text completion, as OpenAI's; a chat's answer may fill the context

_BOTH = ("model", "max_tokens", *CHOOSING_FIELDS, "n", "stop", "stream", "stream_options")
_BOTH_AND = (*_BOTH, "logprobs")
TEXT_FIELDS = (*_BOTH_AND, "prompt", "echo", "best_of")
CHAT_FIELDS = (*_BOTH_AND, "messages", "max_completion_tokens", "top_logprobs")
# These change nothing in a text.
_INERT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# Only these values of them are what a server without them does.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
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
      prompts: token ids, one list per prompt.
      most: maximum number of tokens after each.
      choosing: how they are chosen, one per completion of a prompt.
      echo: the text before each of its completions, one per prompt; empty in a chat.
      stops: texts that end a text.
      stream: whether the answer is sent in pieces.
      usage: whether the last piece tells how many tokens there were.
      logprobs: whether log-probabilities are told.
    """

    served: Served
    chat: bool
    prompts: list[list[int]]
    most: list[int]
    choosing: list[Choosing]
    echo: list[str]
    stops: tuple[str, ...]
    stream: bool
    usage: bool
    logprobs: bool

    @property
    def count(self) -> int:
        """The number of completions: those of the first prompt, of the second, and so on."""
        return len(self.prompts) * len(self.choosing)

    def echo_of(self, index: int) -> str:
        """Return the text before a completion, empty unless the prompt is to be repeated."""
        return self.echo[index // len(self.choosing)]

    def jobs(self, report: Callable[[int, Progress], None]) -> list[Job]:
        """Return a job per completion, which report under their numbers."""

        def job(index: int) -> Job:
            prompt, choice = divmod(index, len(self.choosing))
            return Job(
                self.served,
                self.prompts[prompt],
                self.most[prompt],
                self.choosing[choice],
                self.stops,
                lambda progress: report(index, progress),
            )

        return [job(index) for index in range(self.count)]


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
        choosing = read_choosing(fields, top, self.vocabulary)
        stops = fields.texts("stop", MOST_STOPS)
        limit = _read_limit(fields, chat)
        encode = _encode_chat if chat else _encode_texts
        prompts = encode(fields, served)
        most = [self._room(served, ids, limit) for ids in prompts]
        echo = _read_echo(fields, prompts, served, logprobs)
        each = [with_seed(choosing, number) for number in range(_read_count(fields))]
        return Asked(served, chat, prompts, most, each, echo, stops, stream, usage, logprobs)

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
    given = [x for name in names if (x := fields.integer(name, 1, LARGEST, None)) is not None]
    if len(set(given)) > 1:
        raise RequestError(
            f"max_completion_tokens is {given[0]} and max_tokens is {given[1]}; give one of them",
            param="max_tokens",
        )
    return given[0] if given else None if chat else _DEFAULT_TOKENS


def _read_count(fields: Fields) -> int:
    """Return how many completions each prompt gets."""
    count = fields.integer("n", 1, MOST_CHOICES, None) or 1
    best_of = fields.integer("best_of", 1, MOST_CHOICES, count)
    if best_of != count:
        raise RequestError(
            f"best_of {best_of} is not supported with n {count}; leave it out, and choose among n "
            "completions yourself",
            param="best_of",
            code="unsupported_parameter",
        )
    return count


def _read_echo(
    fields: Fields, prompts: Sequence[Sequence[int]], served: Served, logprobs: bool
) -> list[str]:
    """Return the texts of the prompts where they are to be repeated, empty ones otherwise."""
    if not fields.flag("echo"):
        return [""] * len(prompts)
    if logprobs:
        raise RequestError(
            "echo with logprobs is not supported: the log-probabilities of a prompt's own tokens "
            "are not computed; leave one of them out",
            param="echo",
            code="unsupported_parameter",
        )
    given = fields.value("prompt")
    texts = given if isinstance(given, list) and not _is_ids(given) else [given]
    return [
        text if isinstance(text, str) else served.tokenizer.decode(ids)
        for text, ids in zip(texts, prompts, strict=True)
    ]


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
