"""`lora-jax generate`: text from a model, with or without an adapter."""

from pathlib import Path
from typing import Annotated

import typer

from lora_jax.cli.compile_cache import CompileCacheOption
from lora_jax.cli.errors import PromptError
from lora_jax.cli.options import (
    ADAPTER,
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

EXAMPLES = (
    'lora-jax generate --model my-model --prompt "Once upon a time" --max-tokens 20',
    "lora-jax generate -m my-model --adapter my-adapter --prompt Hello --temperature 0.7 --seed 3",
    "lora-jax generate --model my-model --prompt-file prompt.txt --chat --max-tokens 20",
    'lora-jax generate -m my-model --system "Be brief." --prompt Hello --stop END --max-tokens 20',
)


def command(
    model: ModelOption,
    adapter: Annotated[Path | None, typer.Option(help=ADAPTER)] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="UTF-8 file that contains the prompt; '-' is standard input."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Apply the chat template: the prompt is a user's turn.")
    ] = False,
    system: SystemOption = None,
    stop: StopOption = None,
    max_tokens: MaxTokensOption = 128,
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
    """Continue a prompt, and print the new text as it is generated.

    Generation stops at the tokens that end a text or a turn (config.json, generation_config.json,
    GGUF's metadata, the tokenizer and the chat template name them), at --stop, or after
    --max-tokens.
    """
    refuse_empty(stop)
    text = _prompt(prompt, prompt_file)

    from lora_jax.cli import compile_cache as programs
    from lora_jax.cli.fit import Fit
    from lora_jax.cli.jobs import generate

    with programs.compile_cache(compile_cache):
        generate.run(
            model,
            adapter,
            text,
            chat=chat,
            system=system,
            stop=stop or (),
            max_tokens=max_tokens,
            seed=seed,
            dtype=dtype,
            quantize=quantize,
            fit=Fit.of_options(strict, rename, residual),
            sampling={"temperature": temperature, "top_k": top_k, "top_p": top_p},
        )


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise typer.BadParameter(
            "give either --prompt or --prompt-file; to talk in turns, use 'lora-jax chat'"
        )
    if file is not None:
        text = (
            typer.get_text_stream("stdin").read() if str(file) == "-" else file.read_text("utf-8")
        )
        prompt = text.removesuffix("\n")
    if not prompt:
        raise PromptError("the prompt is empty; give some text to continue")
    return prompt
