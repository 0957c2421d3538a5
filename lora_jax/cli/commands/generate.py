"""`lora-jax generate`: text from a model, with or without an adapter."""

from pathlib import Path
from typing import Annotated

import typer

from lora_jax.cli.errors import PromptError
from lora_jax.cli.options import DType, Model

EXAMPLES = (
    'lora-jax generate --model my-model --prompt "Once upon a time" --max-tokens 20',
    "lora-jax generate -m my-model --adapter my-adapter --prompt Hello --temperature 0.7 --seed 3",
    "lora-jax generate --model my-model --prompt-file prompt.txt --chat --max-tokens 20",
)


def command(
    model: Model,
    adapter: Annotated[
        Path | None, typer.Option(help="An adapter of any kind that 'inspect' reads.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The text to go on from.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="A file with the prompt, UTF-8; '-' is standard input.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is what a user says: use the chat template.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="At most so many new tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the likeliest token each time.")
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option(min=0, help="Draw from the k likeliest tokens alone; 0 for all.")
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(min=1e-9, max=1, help="Draw from the likeliest tokens with this share."),
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    dtype: Annotated[
        DType | None,
        typer.Option(help="To compute in; by default the model's own, float32 for a GGUF file."),
    ] = None,
) -> None:
    """Go on from a prompt, and print the new text as it comes.

    It ends at the model's end-of-text token or after --max-tokens.
    """
    text = _prompt(prompt, prompt_file)

    from lora_jax.cli.jobs import generate

    generate.run(
        model,
        adapter,
        text,
        chat=chat,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        dtype=dtype,
    )


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise typer.BadParameter("give one of --prompt and --prompt-file")
    if file is not None:
        text = (
            typer.get_text_stream("stdin").read() if str(file) == "-" else file.read_text("utf-8")
        )
        prompt = text.removesuffix("\n")
    if not prompt:
        raise PromptError("the prompt is empty; give some text to go on from")
    return prompt
