"""Mistakes on the command line, and the names that other tools have for its options."""

import pytest

pytest.importorskip("typer")

from typer.main import get_command

from lora_jax.cli import app
from lora_jax.cli.foreign_options import advice
from tests.cli.train.command import words

OPTIONS = {
    name: {option for parameter in command.params for option in parameter.opts}
    for name, command in get_command(app.app).commands.items()
}

#: As it is written for other tools -> what the error names.
NAMES = {
    "--learning-rate": "use --lr",
    "--learning_rate": "use --lr",
    "--lora-r": "use --rank",
    "--lora_alpha": "use --alpha",
    "--lora-dropout": "use --dropout",
    "--iters": "use --steps",
    "--max_steps": "use --steps",
    "--num_train_epochs": "use --epochs",
    "--batch-size": "use --batch",
    "--per_device_train_batch_size": "use --batch",
    "--gradient_accumulation_steps": "use --accumulate",
    "--max_seq_length": "use --length",
    "--target_modules": "use --targets",
    "--modules_to_save": "use --train",
    "--num-layers": "use --last-layers",
    "--optim": "use --optimizer",
    "--early_stopping_patience": "use --patience",
    "--grad-checkpoint": "use --remat",
    "--model_name_or_path": "use --model",
    "--dataset": "use --data",
    "--output_dir": "use --out",
    "--adapter-path": "use --adapter",
    "--resume-adapter-file": "use --adapter",
    "--resume_from_checkpoint": "use --resume",
    "--lr_scheduler_type": "use --schedule",
    "--warmup_ratio": "use --warmup",
    "--max_grad_norm": "use --clip",
    "--logging_steps": "use --log-every",
    "--steps-per-eval": "use --eval-every",
    "--val_set_size": "use --eval-split",
    "--bf16": "use --dtype",
    "--use_dora": "use --dora",
    "--save_every": "use --save-every",
    "--config-file": "use --config",
    "--load_in_4bit": "use --quantize nf4",
    "--eval-splt": "perhaps --eval-split",
    "--frobnicate": "No such option: --frobnicate; 'lora-jax train --help' shows the usage",
}


@pytest.mark.parametrize("name", NAMES)
def test_options_of_other_tools(name, tmp_path, fails):
    error = fails(*words("a.txt", tmp_path / "out", name, "1"), status=2)
    assert f"No such option: {name}" in error and NAMES[name] in error


@pytest.mark.parametrize(
    "command, name, wanted",
    [
        ("generate", "--max-new-tokens", "use --max-tokens"),
        ("generate", "--adapter-path", "use --adapter"),
        ("generate", "--temp", "use --temperature"),
        ("merge", "--save-path", "use --out"),
        ("convert", "--output-dir", "use --out"),
        ("merge", "--learning-rate", None),
    ],
)
def test_advice_names_options_of_the_command(command, name, wanted):
    assert advice(name, OPTIONS[command]) == wanted


VALUES = {
    "--steps 0": "Invalid value for '--steps': must be at least 1, got 0;",
    "--steps=x": "Invalid value for '--steps': must be an integer, got x;",
    "--batch 2.5": "Invalid value for '--batch': must be an integer, got 2.5;",
    "--dropout 1.5": "Invalid value for '--dropout': must be at most 0.99, got 1.5;",
    "--epochs -1": "Invalid value for '--epochs': must be at least 0.001, got -1;",
    "--epochs many": "Invalid value for '--epochs': must be a number, got many;",
    "--lr -1": "Invalid value for '--lr': must be above 0, got -1;",
    "--lr 0": "Invalid value for '--lr': must be above 0, got 0;",
    "--lr nan": "Invalid value for '--lr': must be above 0, got nan;",
    "--lr inf": "Invalid value for '--lr': must be finite, got inf;",
    "--alpha 0": "Invalid value for '--alpha': must be above 0, got 0;",
    "--clip -2": "Invalid value for '--clip': must be at least 0, got -2;",
    "--warmup -1": "Invalid value for '--warmup': must be at least 0, got -1;",
    "--weight-decay nan": "Invalid value for '--weight-decay': must be at least 0, got nan;",
    "--lora-plus 0": "Invalid value for '--lora-plus': must be above 0, got 0;",
    "--bias some": "Invalid value for '--bias': 'some' is not one of 'none', 'all', 'adapted';",
    "--dtype int8": "Invalid value for '--dtype': 'int8' is not one of 'float32', 'bfloat16';",
    "--steps 3 --epochs 2": "error: give either --steps or --epochs, not both;",
}


@pytest.mark.parametrize("more", VALUES)
def test_values_are_refused_in_plain_words(more, tmp_path, fails):
    error = fails(*words("a.txt", tmp_path / "out", *more.split(), small=()), status=2)
    assert VALUES[more] in error
    for leak in (
        "Input should",
        "Value error",
        "unable to parse",
        "learning_rate",
    ):
        assert leak not in error


def test_a_value_is_quoted_without_control_characters(tmp_path, fails):
    error = fails(*words("a.txt", tmp_path / "out", "--steps", "\x1b[2J"), status=2)
    assert "\x1b" not in error and "must be an integer" in error
