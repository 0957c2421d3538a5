"""Losses on meshes and in several processes beside one device's: `python -m benchmarks.meshes`.

Every row is `lora-jax train --model tiny` on the same text with the same options, on CPU devices
that XLA is asked to make, in processes of this machine joined by JAX's coordination service.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.report import versions
from lora_jax.training import log

#: Processes, devices of each, and the mesh.
RUNS = (
    (1, 1, None),
    (1, 8, "data=8"),
    (1, 8, "fsdp=4,tensor=2"),
    (2, 1, "data=2"),
    (2, 1, "tensor=2"),
    (2, 4, "fsdp=4,tensor=2"),
    (2, 4, "data=2,fsdp=2,tensor=2"),
)
TEXT = "To be, or not to be, that is the question.\n" * 40
OPTIONS = ("--length", "32", "--batch", "8", "--rank", "4", "--lr", "1e-2", "--dropout", "0.1")
SECONDS = 280  # after which a run has failed


def train(folder: Path, processes: int, devices: int, mesh: str | None, steps: int) -> list[float]:
    """Train in so many processes, and return the loss of every step."""
    name = f"{processes}x{devices}-{mesh}"
    (folder / "text.txt").write_text(TEXT)
    words = ["train", "--model", "tiny", "--data", str(folder / "text.txt"), *OPTIONS]
    words += ["--steps", str(steps), "--out", str(folder / name)]
    words += [] if mesh is None else ["--mesh", mesh]
    if processes > 1:
        words += ["--coordinator", f"127.0.0.1:{_free_port()}", "--processes", str(processes)]
    started = []
    for number in range(processes):
        own = ["--process-id", str(number)] if processes > 1 else []
        with (folder / f"{name}.{number}.txt").open("wb") as output:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "lora_jax", *words, *own],
                    env=_environment(devices),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        statuses = [process.wait(SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
    if any(statuses):
        said = "\n".join(file.read_text() for file in sorted(folder.glob(f"{name}.*.txt")))
        raise RuntimeError(f"{name} ended with {statuses}:\n{said}")
    return log.losses(log.read(folder / name / "log.jsonl"))[1]


def _environment(devices: int) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main() -> None:
    """Print a row for each run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    console = Console()
    table = Table(title=f"losses of {steps} steps; {versions()}")
    for heading in ("processes × devices", "mesh", "first", "last", "largest difference"):
        table.add_column(
            heading, justify="left" if heading == "mesh" else "right", no_wrap=heading == "mesh"
        )
    with tempfile.TemporaryDirectory() as folder:
        alone: list[float] = []
        for processes, devices, mesh in RUNS:
            losses = train(Path(folder), processes, devices, mesh, steps)
            alone = alone or losses
            apart = max(abs(x / y - 1) for x, y in zip(losses, alone, strict=True))
            where = f"{processes} × {devices}", mesh or "one device"
            table.add_row(*where, f"{losses[0]:.6f}", f"{losses[-1]:.6f}", f"{apart:.1e}")
    console.print(table)


if __name__ == "__main__":
    main()
