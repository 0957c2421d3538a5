"""`lora-jax predict`: labels for texts, from a sequence classifier."""

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
    'lora-jax predict --model my-encoder --adapter my-classifier "I liked it" "Never again"',
    "lora-jax predict -m my-encoder --adapter my-classifier --data reviews.jsonl --json",
)


def command(
    model: ModelOption,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to classify.")] = None,
    adapter: Annotated[Path | None, typer.Option(help=ADAPTER)] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Rows with a text, or a .txt file with one per line."),
    ] = None,
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
    """Classify texts with a sequence classifier.

    Each label is printed with its probability, the likeliest first. The classifier is an adapter
    that 'lora-jax train --task classification' or PEFT (SEQ_CLS) wrote, or a directory of a model
    with a classifier's head, such as 'lora-jax merge' writes.
    """
    if bool(texts) == bool(data):
        raise typer.BadParameter("give either texts or --data")
    from lora_jax.cli import compile_cache as programs
    from lora_jax.cli.fit import Fit
    from lora_jax.cli.jobs import predict

    with programs.compile_cache(compile_cache):
        predict.run(
            model,
            adapter,
            data if data is not None else list(texts or ()),
            length=length,
            batch=batch,
            encoding=encoding,
            as_json=json,
            dtype=dtype,
            quantize=quantize,
            fit=Fit.of_options(strict, rename, residual),
        )
