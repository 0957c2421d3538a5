"""`lora-jax generate`: text from a model, with or without an adapter."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_jax.cli.errors import PromptError
from lora_jax.cli.options import ADAPTER, NAMED, SEVERAL
from lora_jax.cli.parameters.groups import in_adapter, in_data, in_output
from lora_jax.cli.parameters.speaking import Speaking
from lora_jax.cli.parameters.takes import takes

if TYPE_CHECKING:  # not for --help
    from lora_jax.cli.adapter_names import Chosen

_ADAPTER = f"{ADAPTER} Several, or base for none: one batch of them. {SEVERAL}"
_PROMPTS = (
    'A .jsonl file with a "prompt" or "messages" in each row, or a .txt file with a prompt in each '
    'line. The rows are printed, or written to --out, with what was "generated" by the "adapter" '
    "that the row names, or else by each --adapter."
)

EXAMPLES = (
    'lora-jax generate --model my-model --prompt "Once upon a time" --max-tokens 20',
    "lora-jax generate -m my-model --adapter my-adapter --prompt Hello --temperature 0.7 --seed 3",
    "lora-jax generate --model my-model --prompt-file prompt.txt --chat --max-tokens 20",
    'lora-jax generate -m my-model --system "Be brief." --prompt Hello --stop END --max-tokens 20',
    "lora-jax generate -m my-model --adapter my-adapter --adapter base --prompt Hi --max-tokens 9",
    "lora-jax generate -m my-model --prompts held-out.jsonl --max-tokens 9 > answers.jsonl",
)


@dataclasses.dataclass(frozen=True)
class GenerateOptions(Speaking):
    """The options as typer has checked them."""

    adapter: Annotated[list[str] | None, in_adapter(metavar=NAMED, help=_ADAPTER)] = None
    prompt: Annotated[
        list[str] | None,
        in_data(
            metavar="TEXT",
            help="Text to continue. Several: one for each --adapter, in their order.",
        ),
    ] = None
    prompt_file: Annotated[
        Path | None,
        in_data(metavar="FILE", help="UTF-8 file that contains the prompt; '-' is standard input."),
    ] = None
    prompts: Annotated[Path | None, in_data(metavar="FILE", help=_PROMPTS)] = None
    out: Annotated[
        Path | None, in_output(metavar="FILE", help="With --prompts: the .jsonl file to write.")
    ] = None
    force: Annotated[bool, in_output("--force", "-f", help="Write into an existing --out.")] = False
    batch: Annotated[int, in_data(min=1, help="With --prompts: rows at a time.")] = 8
    chat: Annotated[
        bool, in_data("--chat", help="Apply the chat template: the prompt is a user's turn.")
    ] = False


@takes(GenerateOptions)
def command(context: typer.Context, options: GenerateOptions) -> None:
    """Continue a prompt, and print the new text as it is generated.

    Generation stops at the tokens that end a text or a turn (config.json, generation_config.json,
    GGUF's metadata, the tokenizer and the chat template name them), at --stop, or after
    --max-tokens.

    Several adapters share one base and one batch. Each answers its own --prompt, the first one the
    first, or all answer the same; several prompts with one adapter are continued by that. Each text
    is printed when all are done, below a line with its adapter and its prompt.
    """
    prompts = _prompts(options)
    from lora_jax.cli import compile_cache as programs
    from lora_jax.cli.adapter_names import chosen_adapters
    from lora_jax.cli.jobs import generate, generate_file, generate_many

    chosen = chosen_adapters(options.adapter)
    asked: Any = {
        **{"chat": options.chat, "system": options.system, "seed": options.seed},
        **options.speaker,
    }
    with programs.compile_cache(options.compile_cache):
        if options.prompts is not None:
            written: Any = {"force": options.force, "batch": options.batch}
            generate_file.run(
                options.model, chosen, options.prompts, options.out, **written, **asked
            )
            return
        pairs = _pairs(chosen, prompts)
        if len(pairs) == 1:
            ((one, prompt),) = pairs
            generate.run(options.model, one.path, prompt, **asked)
        else:
            generate_many.run(options.model, pairs, **asked)


def _pairs(chosen: "list[Chosen]", prompts: list[str]) -> "list[tuple[Chosen, str]]":
    """Return which adapter continues which prompt."""
    if len(chosen) > 1 and len(prompts) > 1 and len(chosen) != len(prompts):
        raise typer.BadParameter(
            f"{len(chosen)} --adapter and {len(prompts)} --prompt: give one prompt for each "
            "adapter in their order, or a single prompt for all, or a single adapter for all"
        )
    rows = max(len(chosen), len(prompts))
    every = lambda given: given * (rows if len(given) == 1 else 1)
    return list(zip(every(chosen), every(prompts), strict=True))


def _prompts(options: GenerateOptions) -> list[str]:
    """Return the prompts on the command line; none with --prompts."""
    prompts, file = options.prompt, options.prompt_file
    if options.prompts is not None:
        if prompts or file is not None:
            raise typer.BadParameter(
                "give either --prompts or --prompt and --prompt-file, not both"
            )
        return []
    if options.out is not None or options.force:
        raise typer.BadParameter("--out and --force are for --prompts")
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
