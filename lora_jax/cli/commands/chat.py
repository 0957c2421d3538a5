"""`lora-jax chat`: a conversation with a model, with or without an adapter."""

from typing import Annotated

import typer

from lora_jax.cli.compile_cache import CompileCacheOption
from lora_jax.cli.options import (
    ADAPTER,
    BASE,
    DType,
    MaxTokensOption,
    ModelOption,
    QuantizeOption,
    RenameOption,
    ResidualOption,
    SeedOption,
    StopOption,
    StrictOption,
    SystemOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    refuse_empty,
)

_ADAPTER = (
    f"{ADAPTER} Several: the first one answers until /adapter names another; PATH alone: its last "
    "part is the name."
)

EXAMPLES = (
    "lora-jax chat --model my-model --max-tokens 200",
    "lora-jax chat -m my-model --adapter my-adapter --adapter b=my-mlx-adapter --max-tokens 9",
    "lora-jax chat --model my-model --temperature 0.7 --stop END --max-tokens 20",
)


def command(
    model: ModelOption,
    adapter: Annotated[list[str] | None, typer.Option(metavar="NAME=PATH", help=_ADAPTER)] = None,
    system: SystemOption = None,
    stop: StopOption = None,
    max_tokens: MaxTokensOption = 512,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    dtype: Annotated[
        DType | None,
        typer.Option(help="Dtype of the computation; default: the model's, float32 for GGUF."),
    ] = None,
    quantize: QuantizeOption = None,
    rename: RenameOption = None,
    residual: ResidualOption = False,
    strict: StrictOption = True,
    compile_cache: CompileCacheOption = None,
) -> None:
    """Talk with a model in turns.

    Each line that you type is a turn, and the answer appears as it is made. The model needs a chat
    template. Ctrl-C ends an answer, /reset starts a new conversation, /adapter NAME lets another
    adapter answer, /system TEXT and /save FILE do what they say, /exit or Ctrl-D ends. Without a
    terminal, the lines of standard input are the turns.
    """
    refuse_empty(stop)
    from lora_jax.cli import compile_cache as programs
    from lora_jax.cli.adapter_names import named_adapters
    from lora_jax.cli.fit import Fit
    from lora_jax.cli.jobs import chat

    named = named_adapters(BASE, adapter or [])
    del named[BASE]

    with programs.compile_cache(compile_cache):
        chat.run(
            model,
            named,
            system=system,
            stop=stop or (),
            max_tokens=max_tokens,
            seed=seed,
            dtype=dtype,
            quantize=quantize,
            fit=Fit.of_options(strict, rename, residual),
            sampling={"temperature": temperature, "top_k": top_k, "top_p": top_p},
        )
