"""Start a writer, kill it at a random moment, and check what is left."""

import multiprocessing
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import Any

from lora_jax.training import log
from tests.stress.killed_writers import writers

WAIT = 300.0  # seconds for a process to come as far as to write
TEMPORARY = re.compile(r"\.lora_jax-|orbax-checkpoint-tmp")


def context() -> Any:
    """Return a context that forks from a server with everything imported and nothing run."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.stress.killed_writers.writers"])
    return found


def kill(process: BaseProcess) -> None:
    if process.pid is not None and process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()


def saves(kind: str, folder: Path, count: int, seed: int) -> list[str]:
    """Kill `count` writers of a kind one after another; return what was wrong."""
    rng, problems = Random(f"{seed} {kind}"), []
    folder.mkdir(parents=True, exist_ok=True)
    done = context().RawValue("q", -1)
    for number in range(count):
        last = done.value
        process = context().Process(target=writers.save_forever, args=(kind, folder, done))
        process.start()
        began = time.monotonic()
        while done.value == last and process.is_alive() and time.monotonic() - began < WAIT:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        alive = process.is_alive()
        kill(process)
        where = f"{kind}, kill {number}"
        if not alive:
            return [*problems, f"{where}: the writer ended by itself ({process.exitcode})"]
        try:
            found = writers.KINDS[kind][1](folder)
        except Exception as error:
            problems.append(f"{where}: {type(error).__name__}: {error}")
            continue
        if found not in (done.value, done.value + 1):
            problems.append(f"{where}: version {found} after {done.value} was done")
        left = leftovers(folder)
        if len(left) > 2:
            problems.append(f"{where}: temporary files accumulate: {left}")
        done.value = found
    return problems


def leftovers(folder: Path) -> list[str]:
    """Return the outermost files and directories with names of temporary ones."""
    found = []
    for path, folders, files in os.walk(folder):
        found += [name for name in [*folders, *files] if TEMPORARY.search(name)]
        folders[:] = [name for name in folders if not TEMPORARY.search(name)]
        del path
    return found


def training(folder: Path, count: int, seed: int) -> tuple[list[str], int]:
    """Kill and resume a run repeatedly; its log must equal that of a run never killed."""
    rng, problems, kills, runs = Random(f"{seed} training"), [], 0, 0
    whole = _train(folder / "whole", None, rng)
    if whole is not None:
        return [f"the run that is not killed: {whole}"], 0
    want = without_times(folder / "whole")
    while kills < count:
        run = folder / f"run-{runs}"
        runs += 1
        while not _finished(run):
            ended = _train(run, rng if kills < count else None, rng)
            if ended == "killed":
                kills += 1
            elif ended is not None:
                return [*problems, f"run {runs}, after {kills} kills: {ended}"], kills
        if without_times(run) != want:
            problems.append(f"run {runs}: another log than that of the run never killed")
        if leftovers(run):
            problems.append(f"run {runs}: left {leftovers(run)}")
    return problems, kills


def _train(folder: Path, kill_by: Random | None, rng: Random) -> str | None:
    """Return None if the run ended by itself as expected, else "killed" or what went wrong."""
    done = context().RawValue("q", 0)
    process = context().Process(target=writers.train_on, args=(folder, done))
    process.start()
    if kill_by is not None:
        before, began = len(log.read(folder / "log.jsonl")), time.monotonic()
        # Mostly while it trains and saves, sometimes before that.
        while (
            rng.random() < 0.999
            and len(log.read(folder / "log.jsonl")) <= before
            and process.is_alive()
            and time.monotonic() - began < WAIT
        ):
            time.sleep(0.01)
        time.sleep(kill_by.uniform(0, 0.3))
        if process.is_alive():
            kill(process)
            return "killed"
    process.join()
    return None if process.exitcode == 0 and done.value else f"exit code {process.exitcode}"


def _finished(folder: Path) -> bool:
    steps, _ = log.losses(log.read(folder / "log.jsonl"))
    with writers.Checkpoints(folder / "checkpoints") as checkpoints:
        return bool(steps) and steps[-1] == writers.STEPS and writers.STEPS in checkpoints.steps()


def without_times(folder: Path) -> list[dict[str, Any]]:
    """Return the parts of a log's records that must be equal."""
    records = log.read(folder / "log.jsonl")
    return [log.without_speed(record) for record in records]


def command(words: Sequence[str], folder: Path, count: int, seed: int) -> tuple[list[str], int]:
    """Kill a training command and resume it with `--resume`.

    Args:
      words: the command; `{out}` in it stands for the directory of a run.
    """
    rng, problems, kills, runs = Random(f"{seed} command"), [], 0, 0

    def words_for(out: Path) -> list[str]:
        resume = ["--resume"] if out.exists() else []
        return [*(word.replace("{out}", str(out)) for word in words), *resume]

    began = time.monotonic()
    subprocess.run(words_for(folder / "whole"), check=True, capture_output=True)
    seconds, want = time.monotonic() - began, without_times(folder / "whole")
    while kills < count:
        run = folder / f"run-{runs}"
        runs += 1
        while True:
            process = subprocess.Popen(
                words_for(run), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            try:
                limit = rng.uniform(0, seconds) if kills < count else None
                _, errors = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
                continue
            if process.returncode:
                return [*problems, f"after {kills} kills: {errors.decode()[-500:]}"], kills
            break
        if without_times(run) != want:
            problems.append(f"run {runs}: another log than that of the run never killed")
    return problems, kills
