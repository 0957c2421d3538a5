"""`Job`: one text to be continued, and what is reported while it is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lora_jax.models.stops import special_ids
from lora_jax.models.text.stop_text import StopText
from lora_jax.models.text.text_stream import TextStream
from lora_jax.serving.choosing import Choosing
from lora_jax.serving.errors import RequestError
from lora_jax.serving.rows import Sampled
from lora_jax.serving.served import Served

STOP, LENGTH = "stop", "length"  # why a text has ended, in OpenAI's words


@dataclass(frozen=True)
class Progress:
    """What has become of a job since the last report.

    Attributes:
      text: new text, which may be empty.
      tokens: the tokens since the last report. Their text may come later: a character or a stop
        text may take several.
      finish: `STOP` or `LENGTH` with the last report, None before.
      error: why there is no more to come, if the job has failed.
    """

    text: str = ""
    tokens: tuple[Sampled, ...] = ()
    finish: str | None = None
    error: RequestError | None = None


@dataclass(eq=False)
class Job:
    """A prompt, and how it is to be continued.

    Attributes:
      served: the adapter.
      ids: the prompt.
      most: maximum number of tokens.
      choosing: how they are chosen.
      stops: texts that end the text, special tokens among them.
      report: called with each `Progress`, in the scheduler's thread; must not raise or wait.
      made: how many tokens were made.
      done: whether the last report was made, or nobody waits for it any more.
    """

    served: Served
    ids: list[int]
    most: int
    choosing: Choosing
    stops: Sequence[str]
    report: Callable[[Progress], None]
    made: int = 0
    done: bool = False
    _text: TextStream = field(init=False)
    _stop: StopText = field(init=False)
    _ends: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self._text = TextStream(self.served.tokenizer.decode)
        self._stop = StopText(self.stops)
        self._ends = self.served.ends | special_ids(self.served.tokenizer, self.stops)

    def add(self, token: Sampled) -> bool:
        """Take the next token, report what it adds, and return whether it was the last one."""
        self.made += 1
        if token.token in self._ends:
            return self._end("", token, STOP)
        text = self._stop.push(self._text.push(token.token))
        if self._stop.ended:
            return self._finish(Progress(text, (token,), STOP))
        if self.made >= self.most:
            return self._end(text, token, LENGTH)
        self.report(Progress(text, (token,)))
        return False

    def fail(self, error: RequestError) -> None:
        """Report that no more is to come."""
        self._finish(Progress(error=error))

    def _end(self, text: str, token: Sampled, finish: str) -> bool:
        """Report the last token, and what was held back."""
        text += self._stop.push(self._text.end())
        if self._stop.ended:
            finish = STOP
        return self._finish(Progress(text + self._stop.end(), (token,), finish))

    def _finish(self, progress: Progress) -> bool:
        self.done = True
        self.report(progress)
        return True
