"""Options that several commands share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from lora_jax.cli.errors import OutputError
from lora_jax.cli.parameters.groups import in_adapter, in_data, in_model, in_output, in_sampling

DType = Literal["float32", "bfloat16", "float16"]

QUANTIZE = (
    "Quantize the linear layers while the model is read: nf4, int8, int4 or another kind; keep: "
    "stay with the codes in the file. Or by name: lm_head=int8,nf4."
)

ModelOption = Annotated[
    str,
    in_model(
        "--model",
        "-m",
        help="Base model: a Hugging Face directory, a GGUF file, or smollm2 (downloaded).",
    ),
]
ForceOption = Annotated[
    bool, in_output("--force", "-f", help="Write into an existing output path.")
]
StrictOption = Annotated[
    bool,
    in_adapter(
        help="Refuse an adapter with tensors that do not fit, or leave them out with a warning."
    ),
]
SystemOption = Annotated[
    str | None,
    in_data(metavar="TEXT", help="System message of a conversation; implies --chat."),
]
StopOption = Annotated[
    list[str] | None,
    in_sampling(metavar="TEXT", help="End before this text; may be given several times."),
]
MaxTokensOption = Annotated[int, in_sampling(min=1, help="Maximum number of new tokens.")]
TemperatureOption = Annotated[
    float, in_sampling(min=0, help="Sampling temperature; 0 is greedy decoding.")
]
TopKOption = Annotated[
    int, in_sampling(min=0, help="Sample from the k most likely tokens; 0: from all.")
]
TopPOption = Annotated[
    float,
    in_sampling(
        min=1e-9, max=1, help="Sample from the most likely tokens with this total probability."
    ),
]
SeedOption = Annotated[int, in_sampling(help="Random seed for sampling.")]
LengthOption = Annotated[
    int,
    in_data(min=0, help="Maximum tokens per row; 0: 512, or the model's maximum if smaller."),
]
BatchOption = Annotated[int, in_data(min=1, help="Rows per batch.")]
EncodingOption = Annotated[str, in_data(help="Text encoding of the data files.")]
JsonOption = Annotated[bool, in_output("--json", help="Print JSON, one object per line.")]
RenameOption = Annotated[
    list[str] | None,
    in_adapter(
        "--rename",
        metavar="OLD=NEW",
        help="Replace a part of the adapter's tensor names, such as a prefix; may be repeated.",
    ),
]
ResidualOption = Annotated[
    bool,
    in_adapter(
        "--residual",
        help="The base is what PiSSA or another initialization left of the original one.",
    ),
]
FullRankOption = Annotated[
    int | None,
    in_adapter(
        "--full-rank",
        min=1,
        help="The rank for changes of an image generator that are not of low rank (LoHa, LoKr).",
    ),
]
NamingOption = Annotated[
    Path | None,
    in_model(help="Names and axes of a custom model, a JSON file; see lora_jax.files.naming."),
]
QuantizeOption = Annotated[
    str | None,
    in_model("--quantize", metavar="KIND", help=QUANTIZE),
]
OutOption = Annotated[Path, in_output("--out", "-o", help="Output path.")]

ADAPTER = "Adapter of any kind that 'inspect' reads."
BASE = "base"  # stands for no adapter among several
#: Adapters as texts, which `adapter_names` reads.
NAMED = "NAME=PATH"
SEVERAL = "A stack or the directory of a sweep: each of its adapters."


def refuse_empty(stops: Sequence[str] | None) -> None:
    """Raise if one of the --stop texts is empty, which every text contains."""
    if "" in (stops or ()):
        raise typer.BadParameter("--stop must not be empty")


def refuse_existing(out: Path, force: bool) -> None:
    """Raise if something exists at `out` that would be overwritten; an empty directory does not.

    Called before the work, which may take long.
    """
    is_there = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    if is_there and not force:
        raise OutputError(f"{out}: exists already; choose another --out, or use --force")
