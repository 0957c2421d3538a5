"""`lora-jax eval`: figures of a model on a file."""

from pathlib import Path
from typing import Annotated

import typer

from lora_jax.cli.compile_cache import CompileCacheOption
from lora_jax.cli.options import (
    ADAPTER,
    NAMED,
    SEVERAL,
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

_ADAPTER = f"{ADAPTER} Several, or base for none: one after the other. {SEVERAL}"
_EXACT = "Also generate answers, greedily, and count those that equal the completion or answer."

EXAMPLES = (
    "lora-jax eval --model my-model --adapter base --adapter my-adapter --data held-out.jsonl",
    "lora-jax eval --model my-encoder --adapter my-classifier --data reviews.jsonl",
    "lora-jax eval --model my-model --data play.txt --length 32 --json",
)


def command(
    model: ModelOption,
    data: Annotated[
        list[Path],
        typer.Option(metavar="FILE", help="Data as for 'train'; may be given several times."),
    ],
    adapter: Annotated[list[str] | None, typer.Option(metavar=NAMED, help=_ADAPTER)] = None,
    exact_match: Annotated[bool, typer.Option("--exact-match", help=_EXACT)] = False,
    max_tokens: Annotated[
        int,
        typer.Option(
            min=0, help="With --exact-match: maximum tokens of an answer; 0: by the data."
        ),
    ] = 0,
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
    """Measure a model on files.

    For a language model: loss and perplexity, where every token that training would train on
    counts once; the accuracy of {"prompt", "choices", "answer"} by the log-probability of the
    choices; of {"prompt", "chosen", "rejected"}, how often the chosen completion is the more
    probable one. For a classifier: its accuracy and loss. Several adapters make a table.
    """
    from lora_jax.cli import compile_cache as programs
    from lora_jax.cli.adapter_names import chosen_adapters
    from lora_jax.cli.fit import Fit
    from lora_jax.cli.jobs import evaluate
    from lora_jax.cli.jobs.evaluating.subject import Settings

    with programs.compile_cache(compile_cache):
        evaluate.run(
            model,
            chosen_adapters(adapter),
            data,
            Settings(length, batch, exact_match, max_tokens, quantize),
            encoding=encoding,
            as_json=json,
            dtype=dtype,
            fit=Fit.of_options(strict, rename, residual),
        )
