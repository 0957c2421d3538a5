"""Run a storm, and tell what went wrong in it."""

import collections
import concurrent.futures
import dataclasses
import gc
import json
import os
import pathlib
import random
import threading
import time

from tests.serving import live, small
from tests.stress.storm.client import PATIENCE, Said, send
from tests.stress.storm.deeds import BUSY, DEEDS, body

WAITING = 5  # requests that may wait
CALM = [
    {"model": model, "prompt": prompt, "max_tokens": 9, "temperature": temperature, "seed": 3}
    for model in live.NAMES
    for prompt in ("Hello", "a")
    for temperature in (0, 1)
]
BUSY_CODES = ("queue_full", "adapter_slots_full")


@dataclasses.dataclass
class Report:
    """What happened: how often each deed had which status, and what should not have been."""

    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    problems: list[str] = dataclasses.field(default_factory=list)

    def add(self, name: str, said: Said, right: set[int]) -> None:
        """Count an answer, and look whether it is one that the server may give."""
        self.counts[name, said.status] += 1
        what = f"{name}: {said.status} {said.body[:200]!r}"
        if said.status not in right:
            self.problems.append(what)
        elif said.status == BUSY and not (
            said.code in BUSY_CODES and "retry-after: " in said.headers.lower()
        ):
            self.problems.append(f"{what}: a refusal of another kind")
        elif said.status >= 400 and said.body.startswith(b"{"):
            if not json.loads(said.body)["error"]["message"]:
                self.problems.append(f"{what}: no message")
        elif said.status == 200 and said.body.startswith(b"data: "):
            said.events  # noqa: B018  whole, or it raises


def calm_texts(address: tuple[str, int]) -> list[list[str]]:
    """Return what the server says to requests one after another."""
    return [send(address, body(**one)).texts for one in CALM]


def resources() -> tuple[int, int, int]:
    """Return the threads, the open files and the memory of this process, in bytes."""
    gc.collect()
    mine = pathlib.Path("/proc/self")  # of Linux
    files = len([*mine.joinpath("fd").iterdir()])
    pages = int(mine.joinpath("statm").read_text().split()[1])
    return threading.active_count(), files, pages * os.sysconf("SC_PAGE_SIZE")


def run(count: int, seed: int = 0, clients: int = 16) -> Report:
    """Let clients do so many deeds, and look what is left of the server."""
    report, rows = Report(), small.rows()
    rows.warm_up()
    with live.serving(waiting=WAITING) as server:
        host, port = server.url.removeprefix("http://").split(":")
        address, scheduler = (host, int(port)), server.scheduler
        before, compiled = calm_texts(address), rows.compilations
        order = random.Random(seed).choices(list(DEEDS), list(DEEDS.values()), k=count)
        quarter = None

        def do(number: int) -> None:
            deed = order[number]
            try:
                said, right = deed(address, random.Random(f"{seed} {number}"))
                report.add(deed.__name__, said, right)
            except Exception as error:
                report.problems.append(f"{deed.__name__} {number}: {error!r}")

        with concurrent.futures.ThreadPoolExecutor(clients) as pool:
            list(pool.map(do, range(count // 4)))
            quarter = resources()
            list(pool.map(do, range(count // 4, count)))
        end = time.monotonic() + PATIENCE
        while scheduler.load != (0, 0) and time.monotonic() < end:
            time.sleep(0.01)
        after, later = calm_texts(address), resources()
        report.problems += _left_over(server, before == after, quarter, later)
        if rows.compilations != compiled:
            report.problems.append(f"{rows.compilations - compiled} programs were compiled")
    report.problems += [f"stop: {x}" for n in range(max(3, count // 200)) for x in stopped(n)]
    return report


def _left_over(server, is_equal: bool, quarter, later) -> list[str]:
    """Return what is wrong with a server after a storm."""
    scheduler, found = server.scheduler, []
    if not is_equal:
        found.append("texts are others than before")
    if scheduler.load != (0, 0) or len(scheduler.rows.free) != scheduler.rows.count:
        found.append(f"rows are still taken: {scheduler.load}, free {scheduler.rows.free}")
    if scheduler.metrics.failed:
        found.append(f"{scheduler.metrics.failed} requests failed")
    for what, old, new, most in zip(
        ("threads", "files", "bytes of memory"), quarter, later, (20, 20, 60 << 20), strict=True
    ):
        if new > old + most:
            found.append(f"{what} grew from {old} to {new}")
    return found


def stopped(number: int) -> list[str]:
    """Stop a server while it streams: each client gets its text, or is told why not."""
    rng, found = random.Random(number), []
    seconds = (0, PATIENCE, 0.05)[number % 3]
    with live.serving(waiting=WAITING) as server:
        host, port = server.url.removeprefix("http://").split(":")

        def ask(_: int) -> Said:
            time.sleep(rng.random() / 20)
            return send((host, int(port)), body(max_tokens=50, stream=True, temperature=0))

        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            asked = [pool.submit(ask, n) for n in range(12)]
            time.sleep(0.03)
            server.stop(seconds)
            for one in asked:
                try:
                    found += _told(one.result(PATIENCE), wait=seconds == PATIENCE)
                except ConnectionRefusedError:
                    pass  # it came after the end
                except Exception as error:
                    found.append(repr(error))
    return found


def _told(said: Said, wait: bool) -> list[str]:
    if said.status == BUSY:
        known = said.code in ("server_stopping", "queue_full")
        return [] if known else [f"refused: {said.body!r}"]
    if said.status != 200:
        return [f"status {said.status}: {said.body[:200]!r}"]
    last = said.events[-1]
    if "error" in last:
        is_right = last["error"]["code"] == "server_stopping" and not wait
        return [] if is_right else [f"error: {last}"]
    return [] if last["choices"][0]["finish_reason"] else [f"cut off: {last}"]
