"""What `lora-jax convert --trainer` does: another trainer's Orbax checkpoint becomes an adapter."""

from pathlib import Path

import lora_jax as lora
from lora_jax.cli.errors import ConversionError
from lora_jax.cli.fit import EXACT
from lora_jax.cli.jobs.adapter_files import convert
from lora_jax.cli.options import refuse_existing
from lora_jax.core.errors import AdapterFileError, ConfigError, StructureError
from lora_jax.core.foreign import escaped
from lora_jax.files import kinds, orbax
from lora_jax.files.implied_tree import NamedAdapters

_TO = ("peft", "folded", "mlx")  # the formats with Hugging Face's names


def run(
    source: convert.Source,
    trainer: str | None,
    alpha: float | None,
    to: str,
    out: Path,
    *,
    force: bool,
) -> None:
    """Read a checkpoint and write its adapters to `out`; see the command's help.

    Raises:
      ConversionError: an option is wrong or missing, or the checkpoint cannot be read or converted.
      OutputError: something exists at `out`, without `force`.
    """
    path = source.adapter
    if trainer is None:
        raise ConversionError("--alpha is for the checkpoint of a --trainer; other files hold it")
    if to not in _TO:
        raise ConversionError(
            f"--to {to}: a checkpoint becomes {', '.join(_TO)}; in Python lora_jax.orbax.load "
            "reads it for all else"
        )
    if source.model or source.naming or source.fit != EXACT:
        raise ConversionError(
            "--trainer: the checkpoint brings its names and shapes; leave out --model, --naming, "
            "--rename, --residual, --full-rank and --no-strict"
        )
    refuse_existing(out, force)
    try:
        params, naming = orbax.for_torch(orbax.load(path, trainer, alpha=alpha), trainer)
        base, adapters = lora.split(params)
        convert.write(NamedAdapters(adapters, base, naming), to, out)
    except (AdapterFileError, ConfigError, StructureError) as error:
        raise ConversionError(f"{path}: cannot be converted: {error}") from error
    kind = "folded PEFT adapter" if to == "folded" else kinds.DESCRIPTIONS[convert.KIND_OF[to]]
    print(f"wrote {escaped(str(out))}: {kind}")
