"""`lora-jax eval`: the loss of a model on a file."""

from pathlib import Path
from typing import Annotated

import typer

from lora_jax.cli.compile_cache import CompileCacheOption
from lora_jax.cli.options import (
    ADAPTER,
    BatchOption,
    DType,
    EncodingOption,
    JsonOption,
    LengthOption,
    ModelOption,
    QuantizeOption,
    RenameOption,
    ResidualOption,
    StrictOption,
)

EXAMPLES = (
    "lora-jax eval --model my-model --adapter my-adapter --data held-out.jsonl",
    "lora-jax eval --model my-encoder --adapter my-classifier --data reviews.jsonl",
    "lora-jax eval --model my-model --data play.txt --length 32 --json",
)


def command(
    model: ModelOption,
    data: Annotated[
        list[Path],
        typer.Option(metavar="FILE", help="Data as for 'train'; may be given several times."),
    ],
    adapter: Annotated[Path | None, typer.Option(help=ADAPTER)] = None,
    length: LengthOption = 0,
    batch: BatchOption = 8,
    encoding: EncodingOption = "utf-8",
    json: JsonOption = False,
    dtype: Annotated[
        DType | None, typer.Option(help="Dtype of the computation; default: the model's.")
    ] = None,
    quantize: QuantizeOption = None,
    rename: RenameOption = None,
    residual: ResidualOption = False,
    strict: StrictOption = True,
    compile_cache: CompileCacheOption = None,
) -> None:
    """Measure the loss of a model on a file.

    For a language model perplexity is printed too, for a classifier its accuracy. Every token that
    training would train on counts once, and so does every labelled text.
    """
    from lora_jax.cli import compile_cache as programs
    from lora_jax.cli.fit import Fit
    from lora_jax.cli.jobs import evaluate

    with programs.compile_cache(compile_cache):
        evaluate.run(
            model,
            adapter,
            data,
            length=length,
            batch=batch,
            encoding=encoding,
            as_json=json,
            dtype=dtype,
            quantize=quantize,
            fit=Fit.of_options(strict, rename, residual),
        )
