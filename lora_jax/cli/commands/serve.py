"""`lora-jax serve`: an HTTP server of one base and many adapters."""

import typer

from lora_jax.cli.parameters.serve_options import ServeOptions
from lora_jax.cli.parameters.takes import takes

EXAMPLES = (
    "lora-jax serve --model my-model --adapter french=my-adapter --port 8000",
    "lora-jax serve -m smollm2 --adapter play=run/adapter --adapter run4/adapter --rows 16",
)


@takes(ServeOptions)
def command(context: typer.Context, options: ServeOptions) -> None:
    """Serve a model and adapters on it, over OpenAI's HTTP interface.

    Clients choose an adapter by its name as the model of /v1/chat/completions or /v1/completions.
    Requests that arrive together share one batch, whatever their adapters. A page to try a prompt
    is at /. Give it another --host than this machine's own only with --api-key, and behind a proxy
    that encrypts.
    """
    options.check()
    from lora_jax.cli import compile_cache
    from lora_jax.cli.jobs import serve

    with compile_cache.compile_cache(options.compile_cache):
        serve.run(options)
