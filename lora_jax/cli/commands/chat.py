"""`lora-jax chat`: a conversation with a model, with or without an adapter."""

import dataclasses
from typing import Annotated

import typer

from lora_jax.cli.options import ADAPTER, BASE, NAMED, SEVERAL, MaxTokensOption
from lora_jax.cli.parameters.groups import in_adapter
from lora_jax.cli.parameters.speaking import Speaking
from lora_jax.cli.parameters.takes import takes

_ADAPTER = (
    f"{ADAPTER} Several: the first one answers until /adapter names another; PATH alone: its last "
    f"part is the name. {SEVERAL}"
)

EXAMPLES = (
    "lora-jax chat --model my-model --max-tokens 200",
    "lora-jax chat -m my-model --adapter my-adapter --adapter b=my-mlx-adapter --max-tokens 9",
    "lora-jax chat --model my-model --temperature 0.7 --stop END --max-tokens 20",
)


@dataclasses.dataclass(frozen=True)
class ChatOptions(Speaking):
    """The options as typer has checked them."""

    adapter: Annotated[list[str] | None, in_adapter(metavar=NAMED, help=_ADAPTER)] = None
    max_tokens: MaxTokensOption = 512


@takes(ChatOptions)
def command(context: typer.Context, options: ChatOptions) -> None:
    """Talk with a model in turns.

    Each line that you type is a turn, and the answer appears as it is made. The model needs a chat
    template. Ctrl-C ends an answer, /reset starts a new conversation, /adapter NAME lets another
    adapter answer, /adapter none the model alone, /adapters lists them, /system TEXT and /save FILE
    do what they say, /exit or Ctrl-D ends. Without a terminal, the lines of standard input are the
    turns.
    """
    from lora_jax.cli import compile_cache as programs
    from lora_jax.cli.adapter_names import named_adapters
    from lora_jax.cli.jobs import chat

    named = named_adapters(BASE, options.adapter or [])
    del named[BASE]
    more = {"system": options.system, "seed": options.seed, **options.speaker}
    with programs.compile_cache(options.compile_cache):
        chat.run(options.model, named, **more)
