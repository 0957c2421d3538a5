"""`lora-jax quantize`: a model whose linear layers are codes."""

from typing import Annotated

import typer

from lora_jax.cli.options import DType, ForceOption, ModelOption, OutOption

EXAMPLES = (
    "lora-jax quantize --model my-model --kind int8 --out my-model-int8",
    "lora-jax quantize -m my-model --kind lm_head=int8,fp8 --out my-model-8",
)


def command(
    model: ModelOption,
    kind: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="nf4, int8, int4 or another kind; keep: the codes in the file. Or by name: "
            "lm_head=int8,nf4.",
        ),
    ],
    out: OutOption,
    dtype: Annotated[
        DType | None,
        typer.Option(
            help="Dtype of what is not quantized, and of the computation; default: the file's."
        ),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="Largest file of weights: 5GB, 500MB, 2GiB.")
    ] = "5GB",
    force: ForceOption = False,
) -> None:
    """Write a model with quantized linear layers, which other commands read with --quantize keep.

    Embeddings, the output head, norms and biases keep their numbers, unless they are named. One
    tensor at a time is in memory beside the codes. The format is our own: no other program reads
    it. To give a model to others, merge the adapter without --quantize. The tokenizer, the chat
    template and the model's other files are copied.
    """
    from lora_jax.cli.jobs import quantize

    quantize.run(model, kind, out, dtype=dtype, force=force, max_shard_size=max_shard_size)
