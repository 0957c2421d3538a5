"""`lora-jax generate`: text from a model, with or without an adapter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

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
    adapters_or_base,
    refuse_empty,
)
from lora_jax.cli.parameters.groups import in_adapter, in_data, in_model, in_output

_PROMPTS = (
    'A .jsonl file with a "prompt" or "messages" in each row. The rows are printed, or written to '
    '--out, with what was "generated" by each --adapter.'
)

EXAMPLES = (
    'lora-jax generate --model my-model --prompt "Once upon a time" --max-tokens 20',
    "lora-jax generate -m my-model --adapter my-adapter --prompt Hello --temperature 0.7 --seed 3",
    "lora-jax generate --model my-model --prompt-file prompt.txt --chat --max-tokens 20",
    'lora-jax generate -m my-model --system "Be brief." --prompt Hello --stop END --max-tokens 20',
    "lora-jax generate -m my-model --adapter my-adapter --adapter base --prompt Hi --max-tokens 9",
    "lora-jax generate -m my-model --prompts held-out.jsonl --max-tokens 9 > answers.jsonl",
)


def command(
    model: ModelOption,
    adapter: Annotated[
        list[Path] | None,
        in_adapter(help=f"{ADAPTER} Several, or base for none: one batch of them."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        in_data(help="Text to continue. Several: one for each --adapter, in their order."),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        in_data(help="UTF-8 file that contains the prompt; '-' is standard input."),
    ] = None,
    prompts: Annotated[
        Path | None,
        in_data(metavar="FILE", help=_PROMPTS),
    ] = None,
    out: Annotated[
        Path | None, in_output(metavar="FILE", help="With --prompts: the .jsonl file to write.")
    ] = None,
    force: Annotated[
        bool, in_output("--force", "-f", help="Write into an existing --out.")
    ] = False,
    batch: Annotated[int, in_data(min=1, help="With --prompts: rows at a time.")] = 8,
    chat: Annotated[
        bool, in_data("--chat", help="Apply the chat template: the prompt is a user's turn.")
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
        in_model(help="Dtype of the computation; default: the model's, float32 for GGUF."),
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

    Several adapters share one base and one batch. Each answers its own --prompt, the first one the
    first, or all answer the same; several prompts with one adapter are continued by that. Each text
    is printed when all are done, below a line with its adapter and its prompt.
    """
    refuse_empty(stop)
    pairs = []
    if prompts is None:
        if out is not None or force:
            raise typer.BadParameter("--out and --force are for --prompts")
        pairs = _pairs(adapter or [], _prompts(prompt, prompt_file))
    elif prompt or prompt_file is not None:
        raise typer.BadParameter("give either --prompts or --prompt and --prompt-file, not both")

    from lora_jax.cli import compile_cache as programs
    from lora_jax.cli.fit import Fit
    from lora_jax.cli.jobs import generate, generate_file, generate_many

    options: Any = {
        "chat": chat,
        "system": system,
        "stop": stop or (),
        "max_tokens": max_tokens,
        "seed": seed,
        "dtype": dtype,
        "quantize": quantize,
        "fit": Fit.of_options(strict, rename, residual),
        "sampling": {"temperature": temperature, "top_k": top_k, "top_p": top_p},
    }
    with programs.compile_cache(compile_cache):
        if prompts is not None:
            chosen = adapters_or_base(adapter)
            written: Any = {"force": force, "batch": batch}
            generate_file.run(model, chosen, prompts, out, **written, **options)
        elif len(pairs) == 1:
            generate.run(model, *pairs[0], **options)
        else:
            generate_many.run(model, pairs, **options)


def _pairs(adapters: Sequence[Path], prompts: Sequence[str]) -> list[tuple[Path | None, str]]:
    """Return which adapter continues which prompt."""
    chosen = adapters_or_base(adapters)
    if len(chosen) > 1 and len(prompts) > 1 and len(chosen) != len(prompts):
        raise typer.BadParameter(
            f"{len(chosen)} --adapter and {len(prompts)} --prompt: give one prompt for each "
            "adapter in their order, or a single prompt for all, or a single adapter for all"
        )
    rows = max(len(chosen), len(prompts))
    every = lambda given: given * (rows if len(given) == 1 else 1)
    return list(zip(every(chosen), every(list(prompts)), strict=True))


def _prompts(prompts: list[str] | None, file: Path | None) -> list[str]:
    if (not prompts) == (file is None):
        raise typer.BadParameter(
            "give either --prompt or --prompt-file; to talk in turns, use 'lora-jax chat'"
        )
    if file is not None:
        text = (
            typer.get_text_stream("stdin").read() if str(file) == "-" else file.read_text("utf-8")
        )
        prompts = [text.removesuffix("\n")]
    if not prompts or not all(prompts):
        raise PromptError("the prompt is empty; give some text to continue")
    return prompts
