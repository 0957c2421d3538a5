"""Peak memory of large models: `python -m benchmarks.big_model --size 2GB`.

Writes a Llama of random numbers, and then loads it, trains one step and merges, on one device and
on eight. Each row is a process of its own, in which a thread reads RssAnon, the memory that is not
a file's: what the process allocated, on a CPU the arrays of JAX too. What imports take is
subtracted.
"""

import argparse
import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.report import versions
from lora_jax.core.errors import ConfigError
from lora_jax.files.disk.safetensors_stream import Tensor, size_of
from lora_jax.models import hf_directory
from lora_jax.models.weights.sizes import parse_size

WIDTH, FEED_FORWARD, HEADS, GROUPS, HEAD, VOCABULARY = 2048, 5632, 32, 4, 64, 32_000
_BLOCK = 2**22  # numbers that are drawn once


@dataclass(frozen=True)
class Random:
    """A tensor of small random numbers, which are the same every few million."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield them."""
        drawn = (np.random.default_rng(0).normal(size=_BLOCK) * 0.02).astype(self.dtype)
        left = int(np.prod(self.shape))
        while left:
            yield drawn[:left]
            left -= min(left, _BLOCK)


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's tensors by name."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for n in range(layers):
        layer = f"model.layers.{n}"
        for name, size in {"q": HEADS, "k": GROUPS, "v": GROUPS}.items():
            found[f"{layer}.self_attn.{name}_proj.weight"] = (size * HEAD, WIDTH)
        found[f"{layer}.self_attn.o_proj.weight"] = (WIDTH, HEADS * HEAD)
        for name in ("gate", "up"):
            found[f"{layer}.mlp.{name}_proj.weight"] = (FEED_FORWARD, WIDTH)
        found[f"{layer}.mlp.down_proj.weight"] = (WIDTH, FEED_FORWARD)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}.{name}.weight"] = (WIDTH,)
    return found | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}


def write_model(folder: pathlib.Path, size: int, dtype: str) -> int:
    """Write a model of about `size` bytes with a byte tokenizer; return the size in bytes."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    count = lambda layers: sum(int(np.prod(shape)) for shape in shapes(layers).values())
    one = count(1) - count(0)
    layers = max(1, round((size / kind.itemsize - count(0)) / one))
    tensors: dict[str, Tensor] = {name: Random(x, kind) for name, x in shapes(layers).items()}
    settings = {
        **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": dtype},
        **{"hidden_size": WIDTH, "intermediate_size": FEED_FORWARD, "vocab_size": VOCABULARY},
        **{"num_hidden_layers": layers, "num_attention_heads": HEADS, "head_dim": HEAD},
        **{"num_key_value_heads": GROUPS, "tie_word_embeddings": False},
        **{"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    }
    hf_directory.write(folder, settings, tensors, "1GB")
    from lora_jax.models.text.byte_tokenizer import byte_tokenizer

    for name, data in byte_tokenizer().files().items():
        (folder / name).write_bytes(data)
    return sum(map(size_of, tensors.values()))


def load(folder: pathlib.Path, *, fsdp: int = 0, **options: object) -> None:
    """Load the model, on a mesh of `fsdp` devices if it is not 0."""
    import jax

    from lora_jax import models

    mesh = jax.make_mesh((fsdp,), ("fsdp",)) if fsdp else None
    jax.block_until_ready(models.load(folder / "model", mesh=mesh, **options).params)  # type: ignore[arg-type]


def run(folder: pathlib.Path, *words: str) -> None:
    """Run a command of lora-jax, which writes its --out anew."""
    from lora_jax.cli import main

    words = tuple(word.replace("DIR", str(folder)) for word in words)
    shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
    status = main(words)
    if status:
        raise SystemExit(status)


_TRAIN = ("train", "--model", "DIR/model", "--data", "DIR/data.txt", "--length", "32")
_TRAIN = (*_TRAIN, "--batch", "1", "--steps", "2", "--targets", "all-linear")
_MERGE = ("merge", "--model", "DIR/model", "--adapter", "DIR/run")

#: What is measured: its name, how many devices it has, and what it does.
CASES: dict[str, tuple[int, Callable[[pathlib.Path], None]]] = {
    "load": (1, load),
    "load, stacked": (1, lambda x: load(x, scan=True)),
    "load, fsdp=8": (8, lambda x: load(x, fsdp=8)),
    "load, stacked, fsdp=8": (8, lambda x: load(x, fsdp=8, scan=True)),
    "load as float32, fsdp=8": (8, lambda x: load(x, fsdp=8, dtype="float32")),
    "load as nf4": (1, lambda x: load(x, quantize="nf4")),
    "load as nf4, stacked": (1, lambda x: load(x, quantize="nf4", scan=True)),
    "load as nf4, fsdp=8": (8, lambda x: load(x, fsdp=8, quantize="nf4")),
    "train, 2 steps of 32 tokens": (1, lambda x: run(x, *_TRAIN, "--out", "DIR/run")),
    "train on nf4, stacked": (
        1,
        lambda x: run(x, *_TRAIN, "--scan", "--quantize", "nf4", "--out", "DIR/run-q"),
    ),
    "train, stacked": (1, lambda x: run(x, *_TRAIN, "--scan", "--out", "DIR/stacked")),
    "merge": (1, lambda x: run(x, *_MERGE, "--out", "DIR/merged")),
    "merge, stacked": (
        1,
        lambda x: run(x, *_MERGE[:3], "--adapter", "DIR/stacked", "--out", "DIR/merged-s"),
    ),
}


def anonymous() -> int:
    """Return this process's RssAnon in bytes."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no RssAnon: this benchmark needs Linux")


def measure(work: Callable[[], None]) -> tuple[int, int, float]:
    """Return the peak of memory while this is done, what remains, and seconds."""
    import jax

    importlib.import_module("lora_jax.cli.jobs.training.train")

    jax.block_until_ready(jax.jit(lambda x: x + 1)(jax.numpy.zeros(3)))
    before, peak, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return peak - before, anonymous() - before, time.perf_counter() - start


def child(case: str, folder: pathlib.Path) -> dict[str, float]:
    """Measure one case in a process of its own."""
    flags = f"--xla_force_host_platform_device_count={CASES[case][0]}"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.big_model", "--case", case, "--folder", str(folder)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Write the model, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="2GB", help="bytes of the weights")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--only", default="", help="cases that contain this")
    parser.add_argument("--folder", type=pathlib.Path, help="where files stay, and are reused")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        peak, left, seconds = measure(lambda: CASES[options.case][1](options.folder))
        print(json.dumps({"peak": peak, "left": left, "seconds": seconds}))
        return
    try:
        size = parse_size(options.size)
    except ConfigError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or pathlib.Path(temporary)
        report(folder, size, options.dtype, options.only)


def report(folder: pathlib.Path, size: int, dtype: str, only: str) -> None:
    """Measure the cases whose names contain `only`, and print the table."""
    if (folder / "model").exists():
        stored = hf_directory.tensors(folder / "model").values()
        written = sum(map(size_of, stored))
    else:
        written = write_model(folder / "model", size, dtype)
    (folder / "data.txt").write_text("A large model in little memory. " * 100)
    table = Table(title=f"a Llama of {written / 1e9:.2f} GB in {dtype}: peak memory above imports")
    for heading in ("", "devices", "GB", "of the weights", "seconds"):
        table.add_column(heading, justify="right" if heading else "left")
    for case, (devices, _) in CASES.items():
        if only in case:
            found = child(case, folder)
            gigabytes = f"{found['peak'] / 1e9:.2f}"
            share = f"{found['peak'] / written:.2f}"
            print(f"{case}: {gigabytes} GB", file=sys.stderr, flush=True)
            table.add_row(case, str(devices), gigabytes, share, f"{found['seconds']:.0f}")
    console = Console(width=max(Console().width, 100))  # rich assumes 80 columns in a pipe
    console.print(table)
    console.print(versions())


if __name__ == "__main__":
    main()
