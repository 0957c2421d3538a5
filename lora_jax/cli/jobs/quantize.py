"""What `lora-jax quantize` does: read a model into codes, and write them."""

from collections import Counter
from pathlib import Path

from lora_jax.cli import sources
from lora_jax.cli.jobs import model_output
from lora_jax.cli.plurals import count
from lora_jax.core.foreign import escaped
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.quantized.weight import is_quantized
from lora_jax.files.disk.atomic import write_directory
from lora_jax.models import saving
from lora_jax.models.weights.sizes import MAX_SHARD_SIZE
from lora_jax.training.running.speed import in_units


def run(
    model: str,
    kind: str,
    out: Path,
    *,
    dtype: str | None,
    force: bool,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Write `out`; the arguments are the command's options.

    Raises:
      OutputError: something exists at `out`, without `force`, or it is the base itself.
      LoraError: the model cannot be read or quantized so.
    """
    base = sources.find_model(model)
    model_output.check(out, base, force, max_shard_size)
    loaded = sources.load_model(base, dtype, quantize=kind, as_stored=dtype is None)
    files = saving.streamed_files(loaded, max_shard_size=max_shard_size)
    model_output.check_files(out, files)
    beside = model_output.files_beside(base)
    write_directory(out, {**beside, **files})
    print(f"wrote {escaped(str(out))}: {describe(loaded.params)}, {len(beside)} other files")


def describe(params: object) -> str:
    """Return how many weights are of which kind, and their bytes.

    >>> import jax.numpy as jnp
    >>> from lora_jax import quantize
    >>> describe(quantize({"kernel": jnp.ones((128, 64)), "bias": jnp.ones(64)}, "int8"))
    '1 weight in int8 (8.45 kB), 256 B in other arrays'
    """
    leaves = flatten_with_paths(params)[0].values()
    codes = [x for x in leaves if is_quantized(x)]
    parts = [
        f"{count(n, 'weight')} in {kind} "
        f"({in_units(sum(x.nbytes for x in codes if x.kind == kind), 'B')})"
        for kind, n in Counter(x.kind for x in codes).items()
    ]
    rest = sum(x.nbytes for x in leaves if not is_quantized(x))
    return ", ".join([*parts, f"{in_units(rest, 'B')} in other arrays"])
