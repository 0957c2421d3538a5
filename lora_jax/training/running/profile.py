"""A trace of some steps, for TensorBoard and Perfetto."""

from collections.abc import Callable
from pathlib import Path
from typing import Self

import jax

_WARM_UP = 2  # steps before the trace: the first one compiles


def steps_to_profile(steps: range, count: int) -> range:
    """Return which of a process's steps to trace: `count` of them after the first two.

    If there are fewer, they begin earlier.

    >>> [steps_to_profile(range(1, 10), count) for count in (0, 3, 8, 100)]
    [range(3, 3), range(3, 6), range(2, 10), range(1, 10)]
    """
    start = max(steps.start, min(steps.start + _WARM_UP, steps.stop - count))
    return range(start, min(start + count, steps.stop))


class Profile:
    """A context for the loop that traces some of its steps.

    Args:
      steps: the numbers of the steps to trace.
      directory: of the trace, created when it begins.
      wait: waits until all steps that were dispatched have ended.
      say: called with a line that says where the trace is, and what opens it.
    """

    def __init__(
        self,
        steps: range,
        directory: Path,
        wait: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self._steps, self._directory = steps, directory
        self._wait, self._say = wait, say
        self._last: int | None = None  # the last step traced so far

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._last is None:
            return
        try:
            if kind is None:
                self._wait()
        finally:
            self._end(self._last)

    def before(self, step: int) -> None:
        """Begin the trace if a step is the first one of it."""
        if self._steps and step == self._steps[0]:
            self._wait()
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call of Python would slow the steps down
            jax.profiler.start_trace(
                str(self._directory), create_perfetto_trace=True, profiler_options=options
            )
            self._last = step - 1

    def after(self, step: int) -> None:
        """End the trace if a step is the last one of it."""
        if self._last is not None:
            self._last = step
            if step == self._steps[-1]:
                self._wait()
                self._end(step)

    def _end(self, step: int) -> None:
        self._last = None
        jax.profiler.stop_trace()
        if step < self._steps[0]:
            return
        files = sorted(self._directory.rglob("perfetto_trace.json.gz"))
        perfetto = f", or {files[-1]} at https://ui.perfetto.dev" if files else ""
        self._say(
            f"steps {self._steps[0]} to {step} are profiled: open them with 'tensorboard --logdir "
            f"{self._directory}' (pip install tensorboard xprof){perfetto}"
        )
