"""Run Python in several processes of several CPU devices each, as on several hosts."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).parents[2]
OTHER_DEVICES = "--xla_force_host_platform_device_count"


@dataclass(frozen=True)
class Ended:
    """How one process ended; its output stays in `folder`."""

    status: int  # negative: the signal that killed it
    out: str
    err: str


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def is_free(port: int) -> bool:
    """Return whether nothing listens on a port."""
    with socket.socket() as found:
        return found.connect_ex(("127.0.0.1", port)) != 0


class Cluster:
    """Processes that were started together; none outlives its `with` block.

    Args:
      commands: arguments of Python, for one process each; `{port}` is replaced by a free port.
      devices: CPU devices of each process.
      folder: for the output of each process: 0.out, 0.err, 1.out, ...
      more: environment variables of each process.
    """

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        devices: int,
        folder: pathlib.Path,
        more: Sequence[dict[str, str]] | None = None,
    ):
        self.folder, port = folder, free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self.processes = []
        for number, command in enumerate(commands):
            words = [str(word).replace("{port}", str(port)) for word in command]
            with (
                (folder / f"{number}.out").open("wb") as out,
                (folder / f"{number}.err").open("wb") as err,
            ):
                started = subprocess.Popen(
                    [sys.executable, *words],
                    stdout=out,
                    stderr=err,
                    stdin=subprocess.DEVNULL,
                    cwd=ROOT,
                    env=environment(devices) | (more[number] if more else {}),
                    start_new_session=True,
                )
            self.processes.append(started)

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def wait(self, seconds: float) -> list[Ended]:
        """Return how all of them ended; raise `TimeoutError` with their output if they do not."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"still running after {seconds} s:\n{self.output()}") from None
        return [
            Ended(process.returncode, self._read(number, "out"), self._read(number, "err"))
            for number, process in enumerate(self.processes)
        ]

    def wait_for(self, text: str, number: int, seconds: float) -> None:
        """Wait until the standard error of a process contains a text."""
        deadline = time.monotonic() + seconds
        while text not in self._read(number, "err"):
            if time.monotonic() > deadline or self.processes[number].poll() is not None:
                raise TimeoutError(f"process {number} never said {text!r}:\n{self.output()}")
            time.sleep(0.02)

    def output(self) -> str:
        """Return what all of them printed."""
        files = sorted(self.folder.glob("[0-9]*.*"))
        return "\n".join(f"--- {file.name}\n{file.read_text()[-4000:]}" for file in files)

    def _read(self, number: int, stream: str) -> str:
        return (self.folder / f"{number}.{stream}").read_text(errors="replace")


def environment(devices: int) -> dict[str, str]:
    """Return the environment of a process with so many CPU devices."""
    given = os.environ.get("XLA_FLAGS", "").split()
    flags = [flag for flag in given if not flag.startswith(OTHER_DEVICES)]
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": " ".join([*flags, f"{OTHER_DEVICES}={devices}"]),
    }


def run_function(
    name: str, processes: int, devices: int, folder: pathlib.Path, seconds: float = 120
) -> list[Ended]:
    """Run a function of `programs.py`, with a folder as its argument, in every process.

    Raises:
      AssertionError: it failed in one of them; the output of all is in the message.
      TimeoutError: one of them did not end.
    """
    start = ["-m", "tests.processes.programs", name, folder / "files", "127.0.0.1:{port}"]
    commands = [[*start, number, processes] for number in range(processes)]
    with Cluster(commands, devices, folder) as cluster:
        ended = cluster.wait(seconds)
    assert [one.status for one in ended] == [0] * processes, cluster.output()
    return ended


def train(words: Sequence[object], processes: int, devices: int, folder: pathlib.Path) -> Cluster:
    """Start `lora-jax` with these words in every process."""
    more = ["--coordinator", "127.0.0.1:{port}", "--processes", processes]
    commands = [
        ["-m", "lora_jax", *words, *more, "--process-id", number] for number in range(processes)
    ]
    return Cluster(commands, devices, folder)
