"""Options of other tools, and what they are called here.

The names are those of mlx-lm, the PEFT and TRL scripts, axolotl, unsloth, torchtune and llama.cpp.
"""

from collections.abc import Collection

from lora_jax.cli.sweep_options import LISTS, WITHOUT

#: A name without dashes -> options that mean it, of which a command may have some.
_OPTIONS = {
    "--lr": ("learning-rate", "lr-rate"),
    "--rank": ("lora-r", "lora-rank", "r", "lora-dim", "network-dim"),
    "--alpha": ("lora-alpha", "scale", "lora-scale", "network-alpha"),
    "--dropout": ("lora-dropout",),
    "--steps": ("iters", "iterations", "max-steps", "num-steps", "train-steps", "max-iters"),
    "--epochs": ("num-train-epochs", "num-epochs", "epoch", "n-epochs", "max-epochs"),
    "--batch": (
        "batch-size",
        "per-device-train-batch-size",
        "micro-batch-size",
        "train-batch-size",
    ),
    "--accumulate": (
        *("gradient-accumulation-steps", "grad-accumulation-steps", "accumulation-steps"),
        *("gradient-accumulation", "grad-accum"),
    ),
    "--length": (
        *("max-seq-length", "max-seq-len", "max-length", "cutoff-len", "sequence-len", "seq-len"),
        *("sequence-length", "block-size", "context-length", "ctx-size"),
    ),
    "--targets": (
        *("target-modules", "lora-target", "lora-targets", "lora-target-modules", "target"),
        *("keys", "lora-target-linear"),
    ),
    "--train": ("modules-to-save", "additional-target", "lora-modules-to-save", "train-modules"),
    "--exclude": ("exclude-modules",),
    "--layers": ("layers-to-transform",),
    "--last-layers": ("num-layers", "lora-layers"),
    "--model": (
        *("model-name-or-path", "model-name", "base-model", "model-id", "model-path", "base"),
        *("pretrained-model-name-or-path", "model-name-or-path", "hf-path"),
    ),
    "--data": (
        *("dataset", "dataset-name", "train-file", "train-data", "data-path", "dataset-path"),
        *("datasets", "data-file", "training-data"),
    ),
    "--out": (
        *("output-dir", "output", "out-dir", "save-path", "save-dir", "output-path", "outfile"),
        *("mlx-path", "out-path"),
    ),
    "--adapter": (
        *("adapter-path", "adapter-name-or-path", "adapter-file", "lora", "lora-path"),
        *("resume-adapter-file", "peft-path", "lora-weights", "peft-model", "lora-model-dir"),
    ),
    "--resume": ("resume-from-checkpoint", "continue", "auto-resume-from-checkpoints"),
    "--schedule": ("lr-scheduler-type", "lr-scheduler", "lr-schedule", "scheduler"),
    "--warmup": ("warmup-ratio", "warmup-steps", "num-warmup-steps", "lr-warmup-steps"),
    "--clip": ("max-grad-norm", "gradient-clipping", "grad-clip", "clip-grad-norm"),
    "--log-every": ("logging-steps", "log-interval", "steps-per-report", "log-every-n-steps"),
    "--eval-every": ("eval-steps", "steps-per-eval", "eval-interval", "evaluation-steps"),
    "--save-every": ("save-steps", "save-interval", "checkpoint-every"),
    "--eval": ("val-file", "validation-file", "eval-file", "eval-dataset", "valid", "val-data"),
    "--eval-split": ("val-set-size", "val-split", "validation-split", "test-split", "val-size"),
    "--eval-rows": ("max-eval-samples",),
    "--val-batches": ("eval-batches", "max-eval-batches"),
    "--report": ("report-to", "logger", "log-to", "use-wandb", "wandb", "use-tensorboard"),
    "--field": ("text-column", "dataset-text-field", "text-field", "columns"),
    "--patience": ("early-stopping-patience", "early-stopping"),
    "--load-best": ("load-best-model-at-end",),
    "--optimizer": ("optim", "optimiser"),
    "--remat": (
        *("gradient-checkpointing", "grad-checkpoint", "activation-checkpointing"),
        *("enable-activation-checkpointing", "use-gradient-checkpointing"),
    ),
    "--dtype": ("bf16", "fp16", "torch-dtype", "precision", "mixed-precision", "dtypes"),
    "--quantize": ("quantization", "quantization-bit", "bnb-4bit-quant-type", "quant-type", "bits"),
    "--dora": ("use-dora", "peft-use-dora"),
    "--rslora": ("use-rslora", "peft-use-rslora"),
    "--lora-plus": ("loraplus-lr-ratio", "lora-plus-ratio"),
    "--init": ("init-lora-weights", "peft-init-lora-weights", "lora-init"),
    "--seed": ("random-seed", "data-seed", "random-state"),
    "--max-tokens": ("max-new-tokens", "n-predict", "num-tokens", "max-length", "n"),
    "--temperature": ("temp",),
    "--prompt-file": ("file", "input-file"),
    "--system": ("system-prompt", "sys"),
    "--to": ("format", "output-format", "outtype"),
    "--config": ("config-file", "config-path", "yaml"),
    "--force": ("overwrite", "yes", "overwrite-output-dir"),
}

#: Names without an option of the same meaning.
_OTHERWISE = {
    "fine-tune-type": "lora is what it trains; --dora trains magnitudes too, --full all weights",
    "load-in-4bit": "use --quantize nf4",
    "load-in-8bit": "use --quantize int8",
    "train-on-inputs": "use --no-mask-prompt",
    "packing": "short texts always share a row",
}


def advice(name: str, options: Collection[str]) -> str | None:
    """Return what to write instead of an option that does not exist; None if nothing is known.

    Args:
      name: as it was written, "--learning_rate".
      options: those of the command, "--lr".

    >>> advice("--learning_rate", ["--lr"]), advice("--log_every", ["--log-every"])
    ('use --lr', 'use --log-every')
    """
    bare = name.lstrip("-").replace("_", "-").lower()
    if f"--{bare}" in options:
        return f"use --{bare}"
    why = WITHOUT.get(bare.replace("-", "_"))
    if why is not None and f"--{LISTS['rank']}" in options:
        return f"{why}; it is an option of 'lora-jax train'"
    meant = [option for option, names in _OPTIONS.items() if bare in names]
    found = [
        option for option in dict.fromkeys([*meant, *map(_list_of, meant)]) if option in options
    ]
    if found:
        return f"use {' or '.join(found)}"
    return _OTHERWISE.get(bare)


def _list_of(option: str) -> str:
    """Return the option of `sweep` that takes a list of what an option of `train` takes."""
    name = option.removeprefix("--").replace("-", "_")
    return f"--{LISTS.get(name, name).replace('_', '-')}"
