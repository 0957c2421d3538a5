"""Keep the device busy: place batches before their step, and read what a step measured after it."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import jax

Item = TypeVar("Item")

AHEAD = 1  # batches on the device beside that of the step to dispatch next


def place_ahead(batches: Iterable[Any], place: Callable[[Any], Item]) -> Iterator[Item]:
    """Yield batches as `place` puts them on the device, the next `AHEAD` of them placed already.

    >>> placed = place_ahead(iter("abc"), lambda batch: print("place", batch) or batch)
    >>> next(placed)
    place a
    place b
    'a'
    >>> list(placed)
    place c
    ['b', 'c']
    """
    waiting: deque[Item] = deque()
    for batch in batches:
        waiting.append(place(batch))
        if len(waiting) > AHEAD:
            yield waiting.popleft()
    yield from waiting


def late_steps() -> int:
    """Return how many steps are dispatched before what one measured is read.

    One more step keeps a device busy while the host looks at the last one; two more do so if the
    host is held up for the time of a step. On a CPU a step may take seconds, which Ctrl-C waits.
    """
    return 1 if jax.default_backend() == "cpu" else 2


class Late(Generic[Item]):
    """A queue of device values, each of which is read some entries after it was put in.

    Args:
      read: called with each entry's name, its values on the host, and the seconds that it took,
        which begin where the entry before was read, or where it began itself if that was later.
      late: entries that may wait unread; none by `late_steps` if None.
    """

    def __init__(self, read: Callable[[Item, Any, float], None], late: int | None = None) -> None:
        self._read = read
        self._late = late_steps() if late is None else late
        self._waiting: deque[tuple[Item, Any, float]] = deque()
        self._ended = 0.0  # when the last entry was read

    def put(self, name: Item, values: Any, began: float) -> None:
        """Put an entry in, and read those that have waited long enough.

        Args:
          name: passed on to `read`.
          values: a pytree of arrays, which need not be computed yet.
          began: `time.perf_counter()` when the work on the entry began.
        """
        for x in jax.tree.leaves(values):
            if isinstance(x, jax.Array):
                x.copy_to_host_async()  # as soon as it is computed, so that reading is immediate
        self._waiting.append((name, values, began))
        while len(self._waiting) > self._late:
            self._read_one()

    def read_all(self) -> None:
        """Read all entries; this waits for the device."""
        while self._waiting:
            self._read_one()

    def _read_one(self) -> None:
        name, values, began = self._waiting.popleft()
        values = jax.device_get(values)
        ended = time.perf_counter()
        seconds = ended - max(began, self._ended)
        self._ended = ended
        self._read(name, values, seconds)
