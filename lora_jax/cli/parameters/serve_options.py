"""The options of `lora-jax serve`: each one once, as a field of one value."""

import dataclasses
import re
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
from lora_jax.cli.parameters.groups import in_adapter, in_devices, in_model, in_server
from lora_jax.core.foreign import shown

KEY_VARIABLE = "LORA_JAX_API_KEY"
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+")

_ADAPTER = (
    "Adapter of any kind that 'inspect' reads, and the name that requests give as their model; "
    "PATH alone: its last part. May be given several times."
)
_NAME = "Name of the base itself; default: the last part of --model."
_SPARE = "Adapters that clients may load from this machine's disk while the server runs."
_RANK = "Largest rank of these; 0: that of the adapters given here."
_DTYPE = "Dtype of the computation; default: the model's, float32 for GGUF."
_API_KEY = (
    "Key that clients must send, as OpenAI's send theirs; other users of this machine can see it "
    "in the command, not in the variable."
)
_ALLOW_ORIGIN = (
    "Origin of web pages that may ask this server, such as https://example.org; * for all; may be "
    "given several times."
)
_ROWS = "Requests that are answered at a time, in one batch."
_CONTEXT = (
    "Maximum tokens of a request, prompt and completion together; 0: 2048, or the model's maximum "
    "if smaller."
)
_QUEUE = "Requests that may wait; further ones are refused (503)."
_STOP_AFTER = "Seconds that requests have to finish after Ctrl-C or SIGTERM."
_WARM_UP = "Compile for prompts of every length while it waits for requests."


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """The options as typer has checked them, in the order of the help."""

    model: ModelOption
    adapter: Annotated[list[str] | None, in_adapter(metavar="NAME=PATH", help=_ADAPTER)] = None
    name: Annotated[str | None, in_model(help=_NAME)] = None
    dtype: Annotated[DType | None, in_model(help=_DTYPE)] = None
    quantize: QuantizeOption = None
    rename: RenameOption = None
    residual: ResidualOption = False
    strict: StrictOption = True
    spare: Annotated[int, in_adapter(min=0, help=_SPARE)] = 0
    rank: Annotated[int, in_adapter(min=0, help=_RANK)] = 0
    host: Annotated[str, in_server(help="Address to listen at.")] = "127.0.0.1"
    port: Annotated[
        int, in_server(min=0, max=65535, help="Port to listen at; 0: any free one.")
    ] = 8000
    api_key: Annotated[str | None, in_server(metavar="KEY", envvar=KEY_VARIABLE, help=_API_KEY)] = (
        None
    )
    allow_origin: Annotated[list[str] | None, in_server(metavar="ORIGIN", help=_ALLOW_ORIGIN)] = (
        None
    )
    queue: Annotated[int, in_server(min=0, help=_QUEUE)] = 64
    stop_after: Annotated[float, in_server(min=0, help=_STOP_AFTER)] = 30.0
    rows: Annotated[int, in_devices(min=1, help=_ROWS)] = 8
    length: Annotated[int, in_devices("--context", min=0, help=_CONTEXT)] = 0
    warm_up: Annotated[bool, in_devices(help=_WARM_UP)] = True
    compile_cache: CompileCacheOption = None

    def check(self) -> None:
        """Raise `BadParameter` for values that no client could send."""
        key = self.api_key
        if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key):
            raise typer.BadParameter(
                "must be printable ASCII without spaces around it, as it is sent in a header",
                param_hint="--api-key",
            )
        if key == "":
            raise typer.BadParameter(
                f"must not be empty; leave it and ${KEY_VARIABLE} out to serve without a key",
                param_hint="--api-key",
            )
        for origin in self.allow_origin or ():
            if not _ORIGIN.fullmatch(origin):
                raise typer.BadParameter(
                    f"{shown(origin)} is not an origin, which is a scheme and a host without a "
                    "path, such as https://example.org, or *",
                    param_hint="--allow-origin",
                )
