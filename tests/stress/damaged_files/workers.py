"""Damaged files read in a process of their own, which may die or never end."""

import multiprocessing
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection

from tests.stress.damaged_files import check, readers

HANGS = 60.0  # seconds without a result
WARM = 30  # files that are read before memory is measured


def _work(seed: int, numbers: Sequence[int], among: Sequence[str], to: Connection) -> None:
    for _ in check.results(seed + 1, range(WARM * len(among)), among):
        pass
    to.send(None)
    for result in check.results(seed, numbers, among, measured=True):
        to.send(result)
    to.close()


def results(seed: int, numbers: Sequence[int], among: Sequence[str]) -> Iterator[check.Result]:
    """Yield what became of each file; a process that dies or hangs over one is a result as well."""
    left = list(numbers)
    context = multiprocessing.get_context("spawn")
    while left:
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(seed, left, among, theirs))
        process.start()
        theirs.close()
        outcome = ""
        warm = False
        try:
            while left and not outcome:
                if not mine.poll(HANGS if warm else 240):
                    outcome = "hang"
                    break
                result = mine.recv()
                warm = True
                if result is not None:
                    left.remove(result.number)
                    yield result
        except EOFError:
            process.join()
            outcome = f"process died, exit code {process.exitcode}"
        process.kill()
        process.join()
        if left:
            assert warm, outcome
            number = left.pop(0)
            reader, name = readers.name(number, among)
            how = check.mutation(seed, number, among)[3]
            yield check.Result(number, reader, name, how, outcome, outcome, HANGS)
