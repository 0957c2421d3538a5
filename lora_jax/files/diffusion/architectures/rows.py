"""The rows of a naming for a JAX tree of one of the published models."""

import re
from collections.abc import Iterator

from lora_jax.core.errors import ConfigError
from lora_jax.core.foreign import shown_value
from lora_jax.files.diffusion.architectures.modules import CONV, EMBEDDING, LINEAR, NORM
from lora_jax.files.diffusion.architectures.table import ARCHITECTURES
from lora_jax.files.naming import Entry, Naming

#: The name of a module's weight in a Flax tree, and the row's kind.
_LEAVES = {
    LINEAR: ("kernel", LINEAR),
    CONV: ("kernel", CONV),
    NORM: ("scale", ""),
    EMBEDDING: ("embedding", EMBEDDING),
}


def naming(architecture: str, *, joined: bool = False) -> Naming:
    """Return the naming of a JAX tree whose modules are called as diffusers calls them.

    The path of `unet.down_blocks.0.resnets.1.conv1.weight` is
    "unet/down_blocks/0/resnets/1/conv1/kernel", a kernel `[height, width, in, out]`; linear
    kernels are `[in, out]`, norms have "scale" and "bias". A tree of a component alone is put in a
    dictionary: {"unet": params}. The rows are plain data: change or add some for other trees.

    Args:
      architecture: "sd15", "sd21", "sdxl" or "flux", with their CLIP text encoders.
      joined: whether the tree joins numbers to the names before them, as Flax modules with `setup`
        do and MaxDiffusion has them: "unet/down_blocks_0/resnets_1/conv1/kernel".

    Raises:
      ConfigError: no such architecture.

    >>> rows = naming("sdxl", joined=True)
    >>> place = rows.places({"unet/down_blocks_0/resnets_1/conv1/kernel": (3, 3, 8, 4)})
    >>> [names for one in place.values() for _, names in one.layers()]
    [('unet.down_blocks.0.resnets.1.conv1.weight',)]
    """
    if architecture not in ARCHITECTURES:
        known = ", ".join(map(repr, ARCHITECTURES))
        raise ConfigError(
            f"naming: {shown_value(architecture)} is not one of {known}; write rows for other "
            "models, see Naming"
        )
    return Naming(tuple(_rows(architecture, "_" if joined else "/")))


def _rows(architecture: str, join: str) -> Iterator[Entry]:
    seen = set()
    for name, module in ARCHITECTURES[architecture].modules.items():
        count = iter(range(99))
        template = re.sub(r"(?<=\.)\d+(?=\.|$)", lambda _: f"{{n{next(count)}}}", name)  # noqa: B023
        if template in seen:
            continue
        seen.add(template)
        path = re.sub(r"\.(?=\{)", join, template).replace(".", "/")
        leaf, kind = _LEAVES[module.kind]
        yield Entry(f"{template}.weight", f"{path}/{leaf}", kind)
        if module.bias:
            yield Entry(f"{template}.bias", f"{path}/bias")
