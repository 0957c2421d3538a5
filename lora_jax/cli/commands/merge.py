"""`lora-jax merge`: a base model and an adapter as one model."""

from pathlib import Path
from typing import Annotated

from lora_jax.cli.options import (
    ADAPTER,
    DType,
    ForceOption,
    ModelOption,
    OutOption,
    QuantizeOption,
    RenameOption,
    ResidualOption,
    StrictOption,
)
from lora_jax.cli.parameters.groups import in_adapter, in_output

EXAMPLES = (
    "lora-jax merge --model my-model --adapter my-adapter --out merged",
    "lora-jax merge -m my-model --adapter my-adapter --dtype bfloat16 --out merged-16",
)


def command(
    model: ModelOption,
    adapter: Annotated[Path, in_adapter(help=ADAPTER)],
    out: OutOption,
    dtype: Annotated[
        DType | None,
        in_output(
            help="Dtype of the result; default: each tensor's in the base, float32 for GGUF."
        ),
    ] = None,
    quantize: QuantizeOption = None,
    max_shard_size: Annotated[
        str, in_output(help="Largest file of weights: 5GB, 500MB, 2GiB.")
    ] = "5GB",
    rename: RenameOption = None,
    residual: ResidualOption = False,
    strict: StrictOption = True,
    force: ForceOption = False,
) -> None:
    """Merge an adapter into its base: a model in Hugging Face's layout that needs no adapter.

    Weights are added in float32 and rounded once; the share of the update that is lost in rounding
    is printed. One weight at a time is in memory, however large the model is. The tokenizer, the
    chat template and the model's other files are copied, but no data beside them; a tokenizer in
    the adapter's directory takes the place of the base's. The directory is written completely or
    not at all, and the base is never changed.

    With --quantize the base is quantized as 'train --quantize' does it, and the merged weights are
    rounded to the same kind; the share of the update that this loses is printed. Other commands
    read the result with --quantize keep.
    """
    from lora_jax.cli.fit import Fit
    from lora_jax.cli.jobs import merge

    fit = Fit.of_options(strict, rename, residual)
    merge.run(
        model,
        adapter,
        out,
        dtype=dtype,
        quantize=quantize,
        force=force,
        fit=fit,
        max_shard_size=max_shard_size,
    )
