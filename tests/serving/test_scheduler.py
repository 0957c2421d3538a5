"""The scheduler on rows that count: who waits, who is refused, and what a failure touches."""

import threading
import time

import pytest

from lora_jax.models.text.byte_tokenizer import byte_tokenizer
from lora_jax.serving import scheduler as module
from lora_jax.serving.choosing import Choosing
from lora_jax.serving.errors import RequestError
from lora_jax.serving.job import LENGTH, STOP, Job
from lora_jax.serving.rows import Sampled
from lora_jax.serving.scheduler import PROMPT_TOKENS, Scheduler
from lora_jax.serving.served import Served

SERVED = Served("base", byte_tokenizer(), frozenset({0}))
PATIENCE = 20  # seconds


class CountingRows:
    """A row says the letters after its prompt's last one, when the test lets it."""

    def __init__(self, count=2, free_running=True):
        self.count, self.joined, self.cleared, self.lost = count, [], 0, False
        self.compilations = 0
        self.breaks = {}  # token -> what a step that would make it raises
        self.allowed = threading.Semaphore(1000 if free_running else 0)
        self._next = {}

    @property
    def free(self):
        return [row for row in range(self.count) if row not in self._next]

    def join(self, row, ids, slot, choosing):
        self.joined.append(ids)
        if ids[0] in self.breaks:
            raise self.breaks.pop(ids[0])
        self._next[row] = ids[-1] + 1
        return Sampled(ids[-1] + 1, -1.0, [])

    def step(self):
        assert self.allowed.acquire(timeout=PATIENCE)
        for row in self._next:
            self._next[row] += 1
            if self._next[row] in self.breaks:
                raise self.breaks.pop(self._next[row])
        return {row: Sampled(token, -1.0, []) for row, token in self._next.items()}

    def leave(self, row):
        self._next.pop(row, None)

    def clear(self):
        self.cleared += 1
        self._next.clear()


class Asked:
    """A job, and what it reports."""

    def __init__(self, first, most=3, stops=(), ids=None, served=SERVED):
        self.reports, self.ended = [], threading.Event()
        ids = ids or SERVED.tokenizer.encode(first)
        self.job = Job(served, ids, most, Choosing(), stops, self._report)

    def _report(self, progress):
        self.reports.append(progress)
        if progress.finish or progress.error:
            self.ended.set()

    def result(self):
        assert self.ended.wait(PATIENCE)
        last = self.reports[-1]
        return (
            last.error.code if last.error else ("".join(x.text for x in self.reports), last.finish)
        )


@pytest.fixture
def start():
    started = []

    def call(rows, waiting=10, idle=()):
        scheduler = Scheduler(rows, waiting, idle)
        started.append((scheduler, rows))
        scheduler.start()
        return scheduler

    yield call
    for scheduler, rows in started:
        rows.allowed.release(1000)
        scheduler.stop()


def until(true):
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_jobs_join_in_their_order_as_rows_become_free(start):
    rows = CountingRows(2)
    scheduler = start(rows)
    asked = [Asked(letter, most=n + 1) for n, letter in enumerate("adgjm")]
    scheduler.submit([x.job for x in asked])
    assert [x.result() for x in asked] == [
        (text, LENGTH) for text in ("b", "ef", "hij", "klmn", "nopqr")
    ]
    assert rows.joined == [x.job.ids for x in asked]
    assert scheduler.metrics.finished == 5 and scheduler.metrics.tokens == 15
    until(lambda: scheduler.load == (0, 0))


def test_a_text_ends_at_a_stop_or_at_an_end_token(start):
    scheduler = start(CountingRows(4))
    asked = [
        Asked("a", 9, stops=("de", "x")),
        Asked("a", 3, stops=("de",)),
        Asked("", 9, stops=("<|user|>",), ids=[255]),  # a special token, which no text contains
        Asked("", 9, ids=[255], served=Served("base", SERVED.tokenizer, frozenset({257}))),
    ]
    scheduler.submit([x.job for x in asked])
    assert asked[0].result() == ("bc", STOP)
    assert asked[1].result() == ("bcd", LENGTH)  # what was held back is part of the text
    assert asked[2].result() == ("", STOP) and asked[2].job.made == 3
    assert asked[3].result() == ("", STOP) and asked[3].job.made == 2


def test_a_full_queue_refuses_all_of_a_request(start):
    rows = CountingRows(1, free_running=False)
    scheduler = start(rows, waiting=2)
    first = Asked("a")
    scheduler.submit([first.job])
    until(lambda: scheduler.load == (1, 0))
    others = [Asked(x) for x in "abc"]
    with pytest.raises(RequestError) as refused:
        scheduler.submit([x.job for x in others])
    assert (refused.value.status, refused.value.retry_after) == (503, 1)
    assert scheduler.load == (1, 0)
    scheduler.submit([x.job for x in others[:2]])
    with pytest.raises(RequestError, match="queue is full: 2 of 2"):
        scheduler.submit([others[2].job])
    with pytest.raises(
        RequestError, match="asks for 4 completions, but this server takes at most 3"
    ) as many:
        scheduler.submit([Asked("a").job for _ in range(4)])
    assert many.value.status == 400
    rows.allowed.release(100)
    assert [x.result()[0] for x in (first, *others[:2])] == ["bcd", "bcd", "cde"]
    assert scheduler.metrics.refused == 2


def test_a_cancelled_job_frees_its_row(start):
    rows = CountingRows(1, free_running=False)
    scheduler = start(rows)
    long, waiting, last = Asked("a", most=20), Asked("a"), Asked("c", most=2)
    scheduler.submit([x.job for x in (long, waiting, last)])
    until(lambda: len(long.reports) == 1)
    scheduler.cancel([long.job, waiting.job])
    rows.allowed.release(2)
    assert last.result() == ("de", LENGTH)
    assert len(long.reports) == 1 and not waiting.reports and len(rows.joined) == 2
    assert scheduler.metrics.cancelled == 2


def test_a_cancelled_job_waits_no_longer(start):
    """Clients that left do not fill the queue while all rows are busy."""
    rows = CountingRows(1, free_running=False)
    scheduler = start(rows, waiting=2)
    first = Asked("a")
    scheduler.submit([first.job])
    until(lambda: scheduler.load == (1, 0))
    for _ in range(5):
        left = [Asked("x"), Asked("y")]
        scheduler.submit([x.job for x in left])
        scheduler.cancel([x.job for x in left])
        assert scheduler.load == (1, 0)
    last = Asked("d")
    scheduler.submit([last.job])
    rows.allowed.release(100)
    assert [x.result()[0] for x in (first, last)] == ["bcd", "efg"]
    assert len(rows.joined) == 2 and scheduler.metrics.refused == 0


def test_a_failing_prompt_fails_alone(start, caplog):
    rows = CountingRows(2)
    rows.breaks = {SERVED.tokenizer.encode("x")[0]: ValueError("secret")}
    scheduler = start(rows)
    asked = [Asked("a"), Asked("x"), Asked("b")]
    scheduler.submit([x.job for x in asked])
    assert [x.result() for x in asked] == [("bcd", LENGTH), "internal_error", ("cde", LENGTH)]
    assert "secret" not in asked[1].reports[-1].error.message and "secret" in caplog.text
    assert rows.cleared == 0


def test_a_failing_step_fails_the_rows_that_it_had(start, caplog):
    rows = CountingRows(2, free_running=False)
    rows.breaks = {SERVED.tokenizer.encode("c")[0]: RuntimeError("out of memory")}
    scheduler = start(rows)
    asked = [Asked("a"), Asked("m"), Asked("p")]
    scheduler.submit([x.job for x in asked])
    rows.allowed.release(100)
    assert [x.result() for x in asked] == ["internal_error"] * 2 + [("qrs", LENGTH)]
    assert rows.cleared == 1 and scheduler.metrics.failed == 2


def test_a_failing_text_fails_alone(start, caplog):
    scheduler = start(CountingRows(2))
    asked = [Asked("a"), Asked("m")]
    asked[0].job._text.push = lambda token: 1 / 0
    scheduler.submit([x.job for x in asked])
    assert [x.result() for x in asked] == ["internal_error", ("nop", LENGTH)]


def test_long_prompts_let_the_others_continue(start):
    """Only so many tokens of prompts between two steps."""
    rows = CountingRows(3, free_running=False)
    scheduler = start(rows)
    asked = [Asked("", most=9, ids=[1] * PROMPT_TOKENS) for _ in range(3)]
    scheduler.submit([x.job for x in asked])
    until(lambda: rows.joined)
    for joined in (2, 3):
        rows.allowed.release()
        until(lambda joined=joined: len(rows.joined) == joined)
    assert [len(x.reports) for x in asked] == [3, 2, 1]


def test_work_between_steps(start):
    rows = CountingRows(1)
    scheduler = start(rows)
    assert scheduler.call(lambda: threading.current_thread().name).result(PATIENCE) == "scheduler"
    with pytest.raises(ZeroDivisionError):
        scheduler.call(lambda: 1 / 0).result(PATIENCE)
    scheduler.stop()
    with pytest.raises(RequestError, match="is stopping"):
        scheduler.call(lambda: 1).result(PATIENCE)


def test_idle_work_waits_for_jobs_and_may_fail(start, caplog, monkeypatch):
    """One piece at a time: a job that comes meanwhile is next."""
    monkeypatch.setattr(module, "QUIET", 0.001)
    done, asked, may_end = [], Asked("a", most=1), threading.Event()

    def first():
        done.append("first")
        may_end.wait(PATIENCE)

    rows = CountingRows(1)
    idle = [first, lambda: 1 / 0, lambda: done.append(len(asked.reports))]
    scheduler = start(rows, idle=idle)
    until(lambda: done)
    scheduler.submit([asked.job])
    may_end.set()
    until(lambda: len(done) == 2)
    assert done == ["first", 1] and "ZeroDivisionError" in caplog.text
    assert asked.result() == ("b", LENGTH)


def test_a_graceful_stop_finishes_what_is_there(start):
    rows = CountingRows(1, free_running=False)
    scheduler = start(rows)
    asked = [Asked("a"), Asked("b")]
    scheduler.submit([x.job for x in asked])
    scheduler.drain(PATIENCE)
    with pytest.raises(RequestError, match="is stopping") as refused:
        scheduler.submit([Asked("c").job])
    assert refused.value.status == 503 and refused.value.retry_after
    rows.allowed.release(100)
    scheduler.wait_idle(PATIENCE)
    assert [x.result()[0] for x in asked] == ["bcd", "cde"]


def test_what_is_not_done_by_the_deadline_gets_an_error(start):
    rows = CountingRows(1, free_running=False)
    scheduler = start(rows)
    asked = [Asked("a", most=50), Asked("b")]
    scheduler.submit([x.job for x in asked])
    until(lambda: asked[0].reports)
    idle = threading.Thread(target=scheduler.wait_idle, args=(10 * PATIENCE,))
    idle.start()
    scheduler.drain(0)
    rows.allowed.release(2)
    assert [x.result() for x in asked] == ["server_stopping"] * 2
    idle.join(PATIENCE)
    assert not idle.is_alive() and scheduler.load == (0, 0)
