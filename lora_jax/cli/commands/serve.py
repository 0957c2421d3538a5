"""`lora-jax serve`: an HTTP server of one base and many adapters."""

from typing import Annotated

import typer

from lora_jax.cli.compile_cache import CompileCacheOption
from lora_jax.cli.options import (
    DType,
    ModelOption,
    QuantizeOption,
    RenameOption,
    ResidualOption,
    StrictOption,
)

EXAMPLES = (
    "lora-jax serve --model my-model --adapter french=my-adapter --port 8000",
    "lora-jax serve -m smollm2 --adapter play=run/adapter --adapter run4/adapter --rows 16",
)


def command(
    model: ModelOption,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="Adapter of any kind that 'inspect' reads, and the name that requests give as "
            "their model; PATH alone: its last part. May be given several times.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the base itself; default: the last part of --model."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen at; 0: any free one.")
    ] = 8000,
    rows: Annotated[
        int, typer.Option(min=1, help="Requests that are answered at a time, in one batch.")
    ] = 8,
    context: Annotated[
        int,
        typer.Option(
            min=0,
            help="Maximum tokens of a request, prompt and completion together; 0: 2048, or the "
            "model's maximum if smaller.",
        ),
    ] = 0,
    queue: Annotated[
        int, typer.Option(min=0, help="Requests that may wait; further ones are refused (503).")
    ] = 64,
    stop_after: Annotated[
        float,
        typer.Option(min=0, help="Seconds that requests have to finish after Ctrl-C or SIGTERM."),
    ] = 30.0,
    spare: Annotated[
        int,
        typer.Option(
            min=0,
            help="Adapters that clients may load from this machine's disk while the server runs.",
        ),
    ] = 0,
    rank: Annotated[
        int,
        typer.Option(min=0, help="Largest rank of these; 0: that of the adapters given here."),
    ] = 0,
    warm_up: Annotated[
        bool, typer.Option(help="Compile for prompts of every length while it waits for requests.")
    ] = True,
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
    """Serve a model and adapters on it, over OpenAI's HTTP interface.

    Clients choose an adapter by its name as the model of /v1/chat/completions or /v1/completions.
    Requests that arrive together share one batch, whatever their adapters. A page to try a prompt
    is at /. The server has no password: give it another --host than this machine's own only behind
    a proxy that has one.
    """
    from lora_jax.cli import compile_cache as programs
    from lora_jax.cli.fit import Fit
    from lora_jax.cli.jobs import serve

    with programs.compile_cache(compile_cache):
        serve.run(
            model,
            adapter or [],
            name=name,
            fit=Fit.of_options(strict, rename, residual),
            dtype=dtype,
            quantize=quantize,
            address=(host, port),
            limits=serve.Limits(rows, context, queue, stop_after, spare, rank),
            warm_up=warm_up,
        )
