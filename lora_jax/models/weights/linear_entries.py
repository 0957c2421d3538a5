"""The entries of linear layers and norms in a naming, of single layers and of stacked ones."""

from collections.abc import Iterator

from lora_jax.files.naming import Entry


def linear_entries(torch: str, path: str, stacked: bool = False, first: int = 0) -> Iterator[Entry]:
    """Yield a linear layer's weight and bias.

    Args:
      torch: its name.
      path: of its leaves.
      stacked: whether all layers share one leaf.
      first: the number of the first of those.
    """
    axes, bias = ("o i -> n i o", "o -> n o") if stacked else ("", "")
    yield Entry(f"{torch}.weight", f"{path}/kernel", "linear", axes, first=first)
    yield Entry(f"{torch}.bias", f"{path}/bias", "", bias, first=first)


def norm_entries(torch: str, path: str, stacked: bool = False, first: int = 0) -> Iterator[Entry]:
    """Yield a norm's scale and bias; the arguments are those of `linear_entries`."""
    axes = "d -> n d" if stacked else ""
    yield Entry(f"{torch}.weight", f"{path}/scale", "", axes, first=first)
    yield Entry(f"{torch}.bias", f"{path}/bias", "", axes, first=first)


#: Where the leaves of layers are, and whether they are stacked: a tree has only one of the two.
LAYERS = {"layer_{n}": False, "layers": True}
