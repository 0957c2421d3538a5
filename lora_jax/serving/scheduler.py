"""`Scheduler`: the thread in which jobs wait for a row, and rows continue together."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from lora_jax.serving.errors import RequestError, failed, overloaded, stopping
from lora_jax.serving.job import Job
from lora_jax.serving.metrics import Metrics
from lora_jax.serving.rows import Rows, Sampled

_log = logging.getLogger(__name__)
#: Tokens of prompts after which the rows that continue get their next step.
PROMPT_TOKENS = 512
#: Seconds without jobs after which idle work is done: a client that asks again at once is not kept.
QUIET = 1.0


class Scheduler:
    """Continuous batching: jobs join the rows that are free, and leave when they are done.

    All work on the device happens in one thread. Between two steps it frees the rows of jobs that
    nobody waits for any more, lets waiting jobs join in the order in which they came, and does what
    `call` asks for.

    Args:
      rows: where jobs run.
      waiting: how many jobs may wait; further ones are refused.
      idle: work on the rows to do while it waits for jobs, such as `Rows.programs`.
    """

    def __init__(self, rows: Rows, waiting: int, idle: Sequence[Callable[[], None]] = ()) -> None:
        self.rows, self.most_waiting = rows, waiting
        self.metrics = Metrics()
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._idle = deque(idle)
        self._calls: deque[tuple[Callable[[], Any], Future]] = deque()
        self._changed = threading.Condition()
        self._refusing = self._stopped = False
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    @property
    def load(self) -> tuple[int, int]:
        """How many jobs run, and how many wait."""
        return len(self._running), len(self._waiting)

    @property
    def refusing(self) -> bool:
        """Whether it takes no more jobs."""
        return self._refusing

    def slots_in_use(self) -> set[int]:
        """Return the slots whose adapters jobs use that run or wait."""
        with self._changed:
            return {job.served.slot for job in [*self._running.values(), *self._waiting]}

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let jobs wait for a row, all of them or none.

        Raises:
          RequestError: too many jobs wait already, there are more than can ever wait, or the
            scheduler stops.
        """
        most = self.rows.count + self.most_waiting
        if len(jobs) > most:
            raise RequestError(
                f"the request asks for {len(jobs)} completions, but this server takes at most "
                f"{most} at a time; split the request",
                param="n",
            )
        with self._changed:
            if self._refusing:
                raise stopping()
            if len(self._waiting) + len(self._running) + len(jobs) > most:
                self.metrics.refused += 1
                raise overloaded(len(self._waiting), self.most_waiting)
            self._waiting.extend(jobs)
            self._changed.notify_all()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Free the rows of jobs that nobody waits for any more; they report nothing more."""
        with self._changed:
            for job in jobs:
                if not job.done:
                    self.metrics.cancelled += 1
                job.done = True
            if any(job.done for job in self._waiting):  # they take no one's place in the queue
                self._waiting = deque(job for job in self._waiting if not job.done)
            self._changed.notify_all()

    def call(self, work: Callable[[], Any]) -> Future:
        """Do some work on the rows between two steps; the result is in what this returns."""
        future: Future = Future()
        with self._changed:
            if self._stopped:
                future.set_exception(stopping())
            else:
                self._calls.append((work, future))
                self._changed.notify_all()
        return future

    def drain(self, seconds: float) -> None:
        """Take no more jobs; those that are not done after some seconds fail."""
        with self._changed:
            self._refusing = True
            self._deadline = min(self._deadline, time.monotonic() + seconds)
            self._changed.notify_all()

    def wait_idle(self, seconds: float) -> None:
        """Wait until no job runs or waits, but not longer than some seconds."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._running or self._waiting), seconds)

    def stop(self) -> None:
        """Fail all jobs that are left, and end the thread."""
        self.drain(0)
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._has_work() or self._stopped):
                    if not self._changed.wait(QUIET if self._idle else None):
                        break
                has_work = self._has_work()
                if self._stopped and not has_work:
                    return
            if has_work:
                self._turn()
            else:
                self._do_idle_work()

    def _has_work(self) -> bool:
        return bool(self._waiting or self._running or self._calls)

    def _do_idle_work(self) -> None:
        try:
            self._idle.popleft()()
        except Exception:
            _log.exception("work that was not asked for failed")
            self.rows.clear()

    def _turn(self) -> None:
        """Do what is to be done before the next step, and the step."""
        while self._calls:
            _answer(*self._calls.popleft())
        for done in [row for row, job in self._running.items() if job.done]:
            self._free(done)
        if time.monotonic() >= self._deadline:
            self._fail_running(stopping())
            with self._changed:
                late, self._waiting = self._waiting, deque()
            for job in late:
                self._report_failure(job, stopping())
        prompts = 0
        while prompts < PROMPT_TOKENS and (row := self._place_next()) is not None:
            prompts += len(self._running[row].ids)
            self._join(row)
        if self._running:
            self._step()
        with self._changed:  # for who waits until there is nothing to do
            self._changed.notify_all()

    def _place_next(self) -> int | None:
        """Give a free row to the first job that waits, and return it if there is one."""
        with self._changed:
            while self._waiting and self.rows.free:
                job = self._waiting.popleft()
                if not job.done:
                    row = self.rows.free[0]
                    self._running[row] = job
                    return row
        return None

    def _join(self, row: int) -> None:
        """Let the job in a row begin."""
        job = self._running[row]
        try:
            token = self.rows.join(row, job.ids, job.served.slot, job.choosing)
        except Exception as error:
            _log.exception("a prompt of %d tokens failed", len(job.ids))
            self._report_failure(job, failed(error))
            self._free(row)
            if self.rows.lost:
                self._fail_running(failed(error))
            return
        self.metrics.prompt_tokens += len(job.ids)
        self._give(row, token)

    def _step(self) -> None:
        try:
            found = self.rows.step()
        except Exception as error:
            _log.exception("a step of %d rows failed", len(self._running))
            self._fail_running(failed(error))
            return
        for row, token in found.items():
            self._give(row, token)

    def _give(self, row: int, token: Sampled) -> None:
        """Give a token to the job in a row, and free the row if that was the last one."""
        job = self._running[row]
        if not job.done:
            self.metrics.tokens += 1
            try:
                self.metrics.finished += job.add(token)
            except Exception as error:
                _log.exception("the text of a request failed")
                self._report_failure(job, failed(error))
        if job.done:
            self._free(row)

    def _fail_running(self, error: RequestError) -> None:
        """Fail all jobs that have a row; the cache may be lost with them."""
        for row, job in [*self._running.items()]:
            self._report_failure(job, error)
            self._free(row)
        self.rows.clear()

    def _report_failure(self, job: Job, error: RequestError) -> None:
        if not job.done:
            self.metrics.failed += 1
            job.fail(error)

    def _free(self, row: int) -> None:
        self.rows.leave(row)
        with self._changed:
            del self._running[row]


def _answer(work: Callable[[], Any], future: Future) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)
