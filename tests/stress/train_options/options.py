"""Random words for `lora-jax train`: each option with values that are valid, odd or wrong."""

import random
import typing
from collections.abc import Sequence
from typing import Any, Literal

from typer.main import get_command

from lora_jax.cli import app
from lora_jax.cli.train_options import TrainOptions
from tests.stress.train_options.world import KINDS, TAKES

#: Options without a sensible random value: of a file of options, of other processes, or resumed.
LEFT_OUT = {"help", "config", "dump_config", "resume", "out", "data", "model", "task", "steps"}
_NAMES = (
    "q_proj",
    "v_proj",
    "all-linear",
    "q_proj,v_proj",
    "nope",
    "",
    ",",
    "lm_head",
    "norm",
    "*",
)
#: An option of text -> values.
TEXTS: dict[str, Sequence[str]] = {
    "targets": (*_NAMES, "embed_tokens", "model.layers.0.self_attn.q_proj", "mlp"),
    "exclude": _NAMES,
    "train": (*_NAMES, "input_layernorm", "embed_tokens"),
    "layers": ("0", "-1", "0,1", ":1", "-1:", "5", "x", "1:0", "0,0", "::", "0;1"),
    "adapter": ("peft", "peft", "mlx", "native.safetensors", "style.safetensors", "none", "model"),
    "held_out": ("text.jsonl", "play.txt", "none.jsonl", "label.jsonl", "empty.txt", "shards"),
    "field": ("text=text", "text=prompt", "text", "=x", "text=", "nope=text", "label=text"),
    "add_token": ("<new>", "", " ", "<s>", "a", "é\n"),
    "quantize": ("int8", "nf4", "int4", "q_proj=int8,nf4", "keep", "int3.5", "", "lm_head=x"),
    "encoding": ("utf-8", "latin-1", "utf-16", "nope", "", "ascii"),
    "mesh": ("auto", "data=1", "fsdp=1", "fsdp=2", "x=1", "", "data=0", "data"),
    "compile_cache": ("none", "cache", "play.txt"),
    "report": ("jsonl", "tensorboard", "nope", ""),
    "base_name": ("me/base", "", "é x"),
    "coordinator": ("localhost:1",),
}
_NUMBERS = ("0", "1", "2", "-1", "0.5", "1e-3", "nan", "inf", "x", "", "1e400", "٣", "0x10", "1_0")


def parameters() -> dict[str, Any]:
    """Return the options of `train` by name."""
    command = get_command(app.app).commands["train"]  # type: ignore[attr-defined]
    return {p.name: p for p in command.params}


def draw_words(draw: random.Random, data: Sequence[str] = ()) -> list[str]:
    """Return the words of a run: what it must have, and some options.

    Args:
      draw: decides everything.
      data: files to train on; by default some of those that `world.build` writes.
    """
    task = draw.choice([*TAKES, "causal-lm", "causal-lm"])
    kinds = KINDS if draw.random() < 0.1 else TAKES[task]
    models = ["model"] * 8 + ["tiny", "encoder", "none", "peft", "org/name", "play.txt"]
    if task == "classification":
        models += ["encoder"] * 6
    words = ["--model", draw.choice(models), "--task", task]
    files = [*data] or [f"{draw.choice(kinds)}.jsonl"]
    if task == "causal-lm" and not data and draw.random() < 0.3:
        files = [
            draw.choice(["play.txt", "shards", "*.jsonl", "none", "text.jsonl=2", "text.jsonl=x"])
        ]
    words += [word for file in files for word in ("--data", file)]
    words += [
        "--steps",
        draw.choice(["1", "2", "2", "3", "0", "x"] if draw.random() < 0.1 else ["2"]),
    ]
    known = {name: p for name, p in parameters().items() if name not in LEFT_OUT}
    for name in draw.sample([*known], draw.choice([0, 1, 2, 3, 4, 6])):
        words += draw_option(draw, known[name])
    return words


def draw_option(draw: random.Random, parameter: Any) -> list[str]:
    """Return an option with a value."""
    flags = [*parameter.opts, *parameter.secondary_opts]
    long = [flag for flag in flags if flag.startswith("--")]
    if parameter.is_flag:
        return [draw.choice(long)]
    return [long[0], draw.choice(_values(draw, parameter))]


def _values(draw: random.Random, parameter: Any) -> Sequence[str]:
    if parameter.name in TEXTS:
        return TEXTS[parameter.name]
    choices = _choices(typing.get_type_hints(TrainOptions)[parameter.name])
    if choices:
        return [*choices, *([""] if draw.random() < 0.1 else [])]
    return _NUMBERS if draw.random() < 0.3 else _sensible(parameter)


def _choices(hint: Any) -> list[str]:
    """Return the values of a `Literal`, or of one in a union."""
    if typing.get_origin(hint) is Literal:
        return [*typing.get_args(hint)]
    return [x for part in typing.get_args(hint) for x in _choices(part)]


def _sensible(parameter: Any) -> Sequence[str]:
    """Return values that are mostly valid together."""
    if parameter.name in ("processes", "process_id", "epochs"):
        return ("1", "0")
    if parameter.name in ("length",):
        return ("16", "32", "64", "65")
    return ("1", "2", "3", "0.1", "0")
