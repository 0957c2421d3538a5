"""`lora-jax convert`: an adapter from one file format to another."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from lora_jax.cli.options import (
    ADAPTER,
    ForceOption,
    FullRankOption,
    NamingOption,
    OutOption,
    RenameOption,
    ResidualOption,
    StrictOption,
)

Format = Literal["peft", "native", "mlx", "folded", "gguf", "kohya", "diffusers"]
Trainer = Literal["openpi", "gemma", "tunix", "maxtext", "maxtext_qwen"]

EXAMPLES = (
    "lora-jax convert my-adapter --to folded --out my-folded-adapter",
    "lora-jax convert my-mlx-adapter --to peft --out my-peft-adapter",
    "lora-jax convert my-adapter --to native --model my-model --out my-adapter.safetensors",
    "lora-jax convert my-adapter --to gguf --model my-model --out adapter.gguf",
    "lora-jax convert my-style.safetensors --to peft --out my-style",
    "lora-jax convert adapter.safetensors --to peft --naming naming.json --out exported",
)


def command(
    adapter: Annotated[Path, typer.Argument(help=ADAPTER)],
    to: Annotated[Format, typer.Option(help="Output format, see above.")],
    out: OutOption,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Base model, for its names and shapes."),
    ] = None,
    naming: NamingOption = None,
    rename: RenameOption = None,
    residual: ResidualOption = False,
    full_rank: FullRankOption = None,
    strict: StrictOption = True,
    trainer: Annotated[
        Trainer | None,
        typer.Option(help="Whose Orbax checkpoint it is, to be converted to peft, folded or mlx."),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="Alpha of the training, with --trainer: checkpoints do not hold it."),
    ] = None,
    force: ForceOption = False,
) -> None:
    # \b keeps the help from filling up the lines of the list
    """Convert an adapter to another file format; the adapted function stays the same.

    \b
    peft    a directory of Hugging Face PEFT
    folded  the same for readers that ignore
            patterns (vLLM, llama.cpp): the scale
            multiplied into B, one rank for all
    mlx     a directory of mlx-lm
    native  a file of lora_jax
    gguf    a file for llama.cpp's --lora
    kohya, diffusers
            a file for Stable Diffusion or Flux

    PEFT and mlx-lm use the same names, so converting between the two needs nothing else. A file of
    lora_jax has the paths and axes of a JAX model: name the model with --model, or, to convert from
    such a file, describe it with --naming. GGUF has llama.cpp's names: name the model for it too.
    A file for images is read by the names of SD 1.5, SD 2.1, SDXL and Flux, and to peft each of
    its components becomes a directory. An adapter that PEFT saved on the base that PiSSA or OLoRA
    changed becomes one of the original base, which --model names.
    """
    from lora_jax.cli.fit import Fit
    from lora_jax.cli.jobs.adapter_files import checkpoint, convert

    fit = Fit.of_options(strict, rename, residual, full_rank)
    source = convert.Source(adapter, model, naming, fit)
    if trainer is not None or alpha is not None:
        checkpoint.run(source, trainer, alpha, to, out, force=force)
        return
    convert.run(source, to, out, force=force)
