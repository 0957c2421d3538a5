"""What the command line of `lora-jax train` says: every option once, as a field of one value."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from typer import Option

CLASSIFICATION = "classification"

Task = Literal["causal-lm", "classification"]
Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "pissa_fast", "olora"]
Schedule = Literal["cosine", "constant"]
Dtype = Literal["float32", "bfloat16"]

_MODEL = "A directory in Hugging Face's layout, a .gguf file, or a name: smollm2, tiny."
_DATA = "A .jsonl file of rows, or a .txt file; may be given several times."
_OUT = "The run's directory: adapter, checkpoints, log."
_TARGETS = "What to adapt, by commas: torch's names, paths of the tree, or all-linear."
_LENGTH = "Tokens read of a row; 0: 512, or all the model takes."
_SHUFFLE = "A new order of the rows each epoch, or the files' order, packed less tightly."
_SCAN = "Layers in a loop: compiles faster, is slower on a CPU."

Files = list[Path] | None


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line, checked by typer; the order is that of the help."""

    model: Annotated[str, Option(metavar="MODEL", help=_MODEL)]
    data: Annotated[list[Path], Option(metavar="FILE", help=_DATA)]
    out: Annotated[Path, Option(metavar="DIR", help=_OUT)]
    task: Annotated[Task, Option(help="What to learn.")] = "causal-lm"
    held_out: Annotated[
        Files, Option("--eval", metavar="FILE", help="Files to judge by, of the same kind.")
    ] = None
    eval_split: Annotated[
        float, Option(min=0, max=0.9, help="Or the share of the data to judge by.")
    ] = 0.0
    eval_rows: Annotated[int, Option(min=0, help="Judge by at most so many rows; 0: all.")] = 0
    encoding: Annotated[str, Option(help="Of the data files.")] = "utf-8"
    resume: Annotated[bool, Option("--resume", help="Go on with the run in --out.")] = False
    rank: Annotated[int, Option(min=1)] = 8
    alpha: Annotated[float | None, Option(help="The scale is alpha / rank; without it, 1.")] = None
    targets: Annotated[str, Option(help=_TARGETS)] = "all-linear"
    init: Annotated[Init, Option(help="How A and B start.")] = "kaiming"
    dora: Annotated[bool, Option("--dora", help="A magnitude for every output.")] = False
    rslora: Annotated[bool, Option("--rslora", help="Scale by alpha / √rank.")] = False
    dropout: Annotated[float, Option(min=0, max=0.99, help="In the branches.")] = 0.0
    steps: Annotated[int | None, Option(min=1, help="Instead of --epochs.")] = None
    epochs: Annotated[float, Option(min=0.001, help="Times through the data.")] = 1.0
    batch: Annotated[int, Option(min=1, help="Rows of a micro-batch.")] = 4
    accumulate: Annotated[int, Option(min=1, help="Micro-batches of a step.")] = 1
    length: Annotated[int, Option(min=0, help=_LENGTH)] = 0
    lr: Annotated[float, Option(help="The highest learning rate.")] = 2e-4
    schedule: Annotated[Schedule, Option(help="After the warm-up.")] = "cosine"
    warmup: Annotated[float, Option(help="Steps; below 1 a share of all.")] = 0.05
    clip: Annotated[float, Option(help="Of the gradients' norm; 0 for none.")] = 1.0
    weight_decay: Annotated[float, Option(help="Of A and B.")] = 0.0
    lora_plus: Annotated[float, Option(help="B learns so many times faster.")] = 1.0
    eval_every: Annotated[int, Option(min=0, help="Steps; 0: first and last.")] = 0
    save_every: Annotated[int, Option(min=0, help="Steps; 0: the last alone.")] = 100
    seed: Annotated[int, Option(min=0, help="Of start, order and dropout.")] = 0
    shuffle: Annotated[bool, Option(help=_SHUFFLE)] = True
    dtype: Annotated[Dtype | None, Option(help="Of the frozen model; without it, the file's.")] = (
        None
    )
    scan: Annotated[bool, Option(help=_SCAN)] = False

    @property
    def size(self) -> int:
        """Rows of a step."""
        return self.batch * self.accumulate

    @property
    def target_names(self) -> list[str]:
        return [name.strip() for name in self.targets.split(",") if name.strip()]
