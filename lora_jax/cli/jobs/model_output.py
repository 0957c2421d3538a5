"""The directory of a model that a command writes, and the files beside its weights."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from lora_jax.cli import sources
from lora_jax.cli.errors import OutputError
from lora_jax.cli.options import refuse_existing
from lora_jax.core.foreign import shown
from lora_jax.files import kinds
from lora_jax.models import hf_directory
from lora_jax.models.own_files import read_own_files, read_tokenizer_files
from lora_jax.models.stops import GENERATION_CONFIG
from lora_jax.models.weights.sizes import parse_size


def check(out: Path, base: kinds.Found, force: bool, max_shard_size: str) -> None:
    """Check that a model can be written, before the work.

    Raises:
      OutputError: something exists at `out`, without `force`, or it is the base itself.
      ConfigError: `max_shard_size` is not a size.
    """
    if out.exists() and base.path.exists() and out.samefile(base.path):
        raise OutputError(
            f"{out}: is the base model itself, which is never changed; choose another --out"
        )
    refuse_existing(out, force)
    parse_size(max_shard_size)


def check_files(out: Path, files: Collection[str]) -> None:
    """Check that no other weights would remain beside these files.

    Raises:
      OutputError: they would.
    """
    if others := hf_directory.other_weights(out, files):
        raise OutputError(
            f"{out}: contains a model in other files ({shown(others[0])}), which would remain; "
            "choose another --out"
        )


def files_beside(base: kinds.Found, adapter: Path | None = None) -> Mapping[str, bytes]:
    """Return the model's other files; a tokenizer beside the adapter comes first."""
    own = None if adapter is None else kinds.adapter(adapter).path
    if base.kind == kinds.CHECKPOINT:
        return read_own_files(base.path, own)
    tokenizer = sources.tokenizer_of(base)
    ends = {"eos_token_id": sorted(sources.stop_ids(base, tokenizer))}
    generation = {GENERATION_CONFIG: (json.dumps(ends) + "\n").encode()}
    given = {} if own is None else read_tokenizer_files(own)
    return {**generation, **tokenizer.files(), **given}
