"""The options of `lora-jax train`: each one once, as a field of one value."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from lora_jax.cli.compile_cache import CompileCacheOption
from lora_jax.cli.options import QuantizeOption
from lora_jax.cli.parameters.groups import (
    in_adapter,
    in_data,
    in_devices,
    in_evaluation,
    in_model,
    in_optimization,
    in_output,
    in_preference,
)

CLASSIFICATION = "classification"
CAUSAL_LM, DPO, ORPO, CPO, SIMPO = "causal-lm", "dpo", "orpo", "cpo", "simpo"
PREFERENCES = (DPO, ORPO, CPO, SIMPO)
OF_PREFERENCES = ("beta", "dpo_loss", "label_smoothing", "reference", "gamma")
MEAN = "mean"  # of --pooling
START = "start"  # of --reference

TaskName = Literal["causal-lm", "classification", "dpo", "orpo", "cpo", "simpo"]
DpoName = Literal["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm"]
ReferenceName = Literal["start", "base"]
InitName = Literal["kaiming", "gaussian", "orthogonal", "pissa", "pissa_fast", "olora"]
BiasName = Literal["none", "all", "adapted"]
ScheduleName = Literal["cosine", "constant"]
OptimizerName = Literal[
    "adamw", "lion", "muon", "adafactor", "sgd", "lora-rite", "lora-muon", "riemannian"
]
PoolingName = Literal["model", "mean"]
RematName = Literal["none", "sums", "full", "auto"]
#: Optimizers that update A and B of a weight together.
ON_PAIRS = ("lora-rite", "lora-muon", "riemannian")
#: Optimizers whose steps depend on the number of columns of A, those that a sweep pads with too.
SEES_RANK = ("muon", "adafactor")
REPORTS = ("tensorboard", "wandb", "jsonl")
TrainDType = Literal["float32", "bfloat16"]

_MODEL = (
    "Base model: a directory in Hugging Face's layout, a .gguf file, smollm2 (downloaded), or tiny "
    "(random)."
)
_ADAPTER = (
    "Adapter to start from, of any kind that 'inspect' reads. It decides which weights train, and "
    "their ranks."
)
_FULL = (
    "Train all weights and write a model, not an adapter; --exclude, --layers and --last-layers "
    "leave some as they are. A learning rate is to be far smaller, such as 1e-5."
)
_BASE_NAME = (
    "Name of the base model to write into the adapter, such as its Hub id; default: the Hub id "
    "where it is known, otherwise --model as an absolute path."
)
_DATA = (
    "Training data: a file of rows or a .txt file, see above, a directory of them, or a pattern; "
    "may be given several times. FILE=2 visits its rows twice per epoch, FILE=0.5 half of them."
)
_FIELD = "Column that a key of the rows is read from, such as text=question; may be repeated."
_STREAM = "Read data piece by piece while training, or all at first; default: by its size."
_OUT = "Output directory of the run: adapter, checkpoints, log."
_EVAL_SPLIT = "Fraction of the data to hold out for evaluation, instead of --eval."
_ALPHA = "Numerator of the scale alpha / rank; default: the rank, so the scale is 1."
_TARGETS = "Comma-separated modules to adapt: PyTorch's names, paths in the tree, or all-linear."
_EXCLUDE = "Comma-separated modules to leave out of --targets."
_LAYERS = "Layers to adapt: numbers such as 0,1,-1, or a slice such as -4: for the last four."
_LAST_LAYERS = "Adapt the last so many layers alone: --layers -N:."
_TRAIN = "Comma-separated modules or paths to train fully, such as lm_head or norm."
_BIAS = "Biases to train fully: none, all, or those of adapted modules."
_STEPS = "Training steps, instead of --epochs; with --resume the run's own by default."
_LOG_EVERY = "Steps between lines of progress, which replace the bar outside a terminal."
_INIT = "Initialization of A and B."
_ADD_TOKEN = (
    "Text that becomes one token; trains the embedding and the head in full. May be given several "
    "times."
)
_UNTIE_HEAD = "Train an output head apart from the embedding that it is tied to."
_DORA = "Train one magnitude per output as well (DoRA)."
_POOLING = "Input of a classifier's head: the token that transformers takes, or the mean of all."
_LENGTH = "Maximum tokens per row; 0: 512, or the model's maximum if smaller."
_MASK_PROMPT = "Train on completions and the assistant's turns alone, or on prompts too."
_OPTIMIZER = "Optimizer. AdamW's learning rates suit Muon, a tenth Lion; SGD needs far larger ones."
_WARMUP = "Warm-up steps; a value below 1 is a fraction of all steps."
_CLIP = "Maximum global norm of the gradients; 0 disables clipping."
_LORA_PLUS = "Learning rate of B, as a multiple of the learning rate of A (LoRA+)."
_EVAL_EVERY = "Steps between evaluations; 0: only before the first and after the last step."
_EVAL_ROWS = "Maximum evaluation rows; 0: all."
_VAL_BATCHES = "Maximum evaluation batches of --batch rows, instead of --eval-rows; 0: all."
_PATIENCE = (
    "End the run after so many evaluations in a row without a lower loss, see --eval-every; 0: "
    "after all steps."
)
_LOAD_BEST = "Leave the adapter of the lowest evaluation loss in adapter/, as in best/."
_SAVE_EVERY = "Steps between checkpoints; 0: only after the last step."
_REPORT = (
    "Tool to report the loss, learning rate, gradient norm, speed and evaluations to; may be "
    "repeated. jsonl: metrics.jsonl in --out."
)
_PROFILE = "Steps to trace, after the first ones, for TensorBoard and Perfetto."
_SEED = "Random seed for initialization, data order and dropout."
_SHUFFLE = "Shuffle rows every epoch, or keep the files' order and pack less tightly."
_DTYPE = "Dtype of the frozen model; default: the file's."
_MESH = (
    "Devices to train on, by axis, such as fsdp=4,tensor=2 (also data, expert), or auto; default: "
    "one device."
)
_COORDINATOR = (
    "Address of process 0, for every process of a run, where JAX does not know it (as it does "
    "under Slurm and Open MPI and on Cloud TPUs)."
)
_PROCESSES = "Number of processes, with --coordinator."
_PROCESS_ID = "Number of this process, counted from 0, with --coordinator."
_REMAT = (
    "What is recomputed in the backward pass to save memory: nothing, all but products (sums), or "
    "whole layers; auto: the least that fits into memory."
)
_MEMORY = "Memory per device for --remat auto, in GB; default: what the device or machine has."
_MERGE_AWARE = (
    "With --quantize: train what 'merge --quantize' writes, so that rounding loses nothing of it."
)
_BETA = (
    "Strength of the pull to the reference (dpo), or factor of the preference loss (the others); "
    "default: 0.1, for simpo 2."
)
_DPO_LOSS = "Loss of --task dpo."
_LABEL_SMOOTHING = "Part of the preferences that may be wrong, for dpo and cpo."
_REFERENCE = (
    "What --task dpo compares with: the model before the first step, with --adapter if that is "
    "given, or the base without adapters."
)
_GAMMA = "Margin of rewards that --task simpo asks for."
_ROUTER_LOSS = "Weight of the auxiliary loss of routers, for models with experts."
_SCAN = "Scan over stacked layers: compiles faster, but runs slower on a CPU."


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """The options as typer has checked them, in the order of the help."""

    lists: ClassVar[Mapping[str, str]] = {}  # the names of options that take lists, by these names

    model: Annotated[str, in_model(metavar="MODEL", help=_MODEL)]
    data: Annotated[list[Path], in_data(metavar="FILE", help=_DATA)]
    out: Annotated[Path, in_output(metavar="DIR", help=_OUT)]
    field: Annotated[list[str] | None, in_data(metavar="KEY=COLUMN", help=_FIELD)] = None
    task: Annotated[TaskName, in_data(help="Training objective.")] = "causal-lm"
    held_out: Annotated[
        list[Path] | None,
        in_evaluation(
            "--eval", metavar="FILE", help="Evaluation data, of the same kind as --data."
        ),
    ] = None
    eval_split: Annotated[float, in_evaluation(min=0, max=0.9, help=_EVAL_SPLIT)] = 0.0
    pooling: Annotated[PoolingName, in_adapter(help=_POOLING)] = "model"
    eval_rows: Annotated[int, in_evaluation(min=0, help=_EVAL_ROWS)] = 0
    stream: Annotated[bool | None, in_data("--stream/--no-stream", help=_STREAM)] = None
    encoding: Annotated[str, in_data(help="Text encoding of the data files.")] = "utf-8"
    resume: Annotated[bool, in_output("--resume", help="Resume the run in --out.")] = False
    adapter: Annotated[Path | None, in_adapter(metavar="DIR", help=_ADAPTER)] = None
    full: Annotated[bool, in_adapter("--full", help=_FULL)] = False
    rank: Annotated[int, in_adapter(min=1, help="Rank of A and B.")] = 8
    alpha: Annotated[float | None, in_adapter(help=_ALPHA)] = None
    targets: Annotated[str, in_adapter(help=_TARGETS)] = "all-linear"
    add_token: Annotated[
        list[str] | None, in_model("--add-token", metavar="TEXT", help=_ADD_TOKEN)
    ] = None
    untie_head: Annotated[bool, in_model("--untie-head", help=_UNTIE_HEAD)] = False
    exclude: Annotated[str, in_adapter(help=_EXCLUDE)] = ""
    layers: Annotated[str, in_adapter(help=_LAYERS)] = ""
    last_layers: Annotated[int | None, in_adapter(min=1, metavar="N", help=_LAST_LAYERS)] = None
    train: Annotated[str, in_adapter(help=_TRAIN)] = ""
    bias: Annotated[BiasName, in_adapter(help=_BIAS)] = "none"
    init: Annotated[InitName, in_adapter(help=_INIT)] = "kaiming"
    dora: Annotated[bool, in_adapter("--dora", help=_DORA)] = False
    rslora: Annotated[bool, in_adapter("--rslora", help="Scale by alpha / √rank (rsLoRA).")] = False
    dropout: Annotated[
        float, in_adapter(min=0, max=0.99, help="Dropout rate on the adapter's input.")
    ] = 0.0
    steps: Annotated[int | None, in_optimization(min=1, help=_STEPS)] = None
    epochs: Annotated[
        float | None, in_optimization(min=0.001, help="Passes over the data; default: 1.")
    ] = None
    batch: Annotated[int, in_optimization(min=1, help="Rows per micro-batch.")] = 4
    accumulate: Annotated[int, in_optimization(min=1, help="Micro-batches per step.")] = 1
    length: Annotated[int, in_data(min=0, help=_LENGTH)] = 0
    mask_prompt: Annotated[bool, in_data(help=_MASK_PROMPT)] = True
    optimizer: Annotated[OptimizerName, in_optimization(help=_OPTIMIZER)] = "adamw"
    lr: Annotated[float, in_optimization(help="Peak learning rate.")] = 2e-4
    schedule: Annotated[
        ScheduleName, in_optimization(help="Learning-rate schedule after warm-up.")
    ] = "cosine"
    warmup: Annotated[float, in_optimization(help=_WARMUP)] = 0.05
    clip: Annotated[float, in_optimization(help=_CLIP)] = 1.0
    weight_decay: Annotated[float, in_optimization(help="Weight decay of A and B.")] = 0.0
    lora_plus: Annotated[float, in_optimization(help=_LORA_PLUS)] = 1.0
    router_loss: Annotated[float, in_optimization(min=0, help=_ROUTER_LOSS)] = 0.0
    beta: Annotated[float | None, in_preference(help=_BETA)] = None
    dpo_loss: Annotated[DpoName, in_preference(help=_DPO_LOSS)] = "sigmoid"
    label_smoothing: Annotated[float, in_preference(help=_LABEL_SMOOTHING)] = 0.0
    reference: Annotated[ReferenceName, in_preference(help=_REFERENCE)] = "start"
    gamma: Annotated[float, in_preference(min=0, help=_GAMMA)] = 0.5
    eval_every: Annotated[int, in_evaluation(min=0, help=_EVAL_EVERY)] = 0
    val_batches: Annotated[int, in_evaluation(min=0, help=_VAL_BATCHES)] = 0
    patience: Annotated[int, in_evaluation(min=0, metavar="N", help=_PATIENCE)] = 0
    load_best: Annotated[bool, in_evaluation("--load-best", help=_LOAD_BEST)] = False
    save_every: Annotated[int, in_output(min=0, help=_SAVE_EVERY)] = 100
    log_every: Annotated[int, in_output(min=1, help=_LOG_EVERY)] = 10
    seed: Annotated[int, in_optimization(min=0, help=_SEED)] = 0
    shuffle: Annotated[bool, in_data(help=_SHUFFLE)] = True
    dtype: Annotated[TrainDType | None, in_model(help=_DTYPE)] = None
    quantize: QuantizeOption = None
    merge_aware: Annotated[bool, in_model("--merge-aware", help=_MERGE_AWARE)] = False
    scan: Annotated[bool, in_model(help=_SCAN)] = False
    mesh: Annotated[str | None, in_devices(metavar="AXES", help=_MESH)] = None
    coordinator: Annotated[str | None, in_devices(metavar="HOST:PORT", help=_COORDINATOR)] = None
    processes: Annotated[int | None, in_devices(min=1, help=_PROCESSES)] = None
    process_id: Annotated[int | None, in_devices(min=0, help=_PROCESS_ID)] = None
    remat: Annotated[RematName, in_devices(help=_REMAT)] = "none"
    memory: Annotated[float | None, in_devices(metavar="GB", help=_MEMORY)] = None
    compile_cache: CompileCacheOption = None
    report: Annotated[list[str] | None, in_output(metavar="|".join(REPORTS), help=_REPORT)] = None
    profile: Annotated[int, in_output(min=0, metavar="STEPS", help=_PROFILE)] = 0
    base_name: Annotated[str | None, in_model(metavar="NAME", help=_BASE_NAME)] = None

    @property
    def size(self) -> int:
        """Rows per step."""
        return self.batch * self.accumulate

    @property
    def most_eval_rows(self) -> int:
        """Maximum evaluation rows; 0: all."""
        return self.eval_rows or self.val_batches * self.batch

    @property
    def target_names(self) -> list[str]:
        """`targets` as a list."""
        return names(self.targets)


def names(text: str) -> list[str]:
    """Return the entries of a comma-separated list.

    >>> names("q_proj, v_proj,")
    ['q_proj', 'v_proj']
    """
    return [name.strip() for name in text.split(",") if name.strip()]
