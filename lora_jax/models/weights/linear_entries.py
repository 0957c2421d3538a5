"""The entries of a linear layer in a naming."""

from collections.abc import Iterator

from lora_jax.files.naming import Entry


def linear_entries(torch: str, path: str, stacked: bool = False) -> Iterator[Entry]:
    """Yield a linear layer's weight and bias; with `stacked` all layers share one leaf."""
    axes, bias = ("o i -> n i o", "o -> n o") if stacked else ("", "")
    yield Entry(f"{torch}.weight", f"{path}/kernel", "linear", axes)
    yield Entry(f"{torch}.bias", f"{path}/bias", "", bias)
