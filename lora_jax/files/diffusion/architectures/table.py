"""The published models whose modules are known here, one row each."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

from lora_jax.files.diffusion.architectures.clip import ClipText
from lora_jax.files.diffusion.architectures.flux import Flux
from lora_jax.files.diffusion.architectures.modules import Module
from lora_jax.files.diffusion.architectures.unet import UNet

_CLIP_L, _CLIP_G = ClipText(), ClipText(width=1280, layers=32, projected=1280)


@dataclasses.dataclass(frozen=True, eq=False)
class Architecture:
    """The components of a pipeline that can have adapters.

    Attributes:
      components: by diffusers' names of them: "unet", "text_encoder", ...
      layout: the names of modules that kohya's trainer gives its files: "diffusers" or "original".
      version: what kohya's trainer calls the base in a file's metadata.
    """

    components: Mapping[str, UNet | Flux | ClipText]
    layout: Literal["diffusers", "original"]
    version: str

    @functools.cached_property
    def modules(self) -> dict[str, Module]:
        """The modules by name, with that of the component: "unet.conv_in"."""
        return {
            f"{component}.{module.name}": module
            for component, model in self.components.items()
            for module in model.modules()
        }


ARCHITECTURES = {
    "sd15": Architecture(
        {
            "unet": UNet((1, 1, 1, 0), 768, False, 0, (320, 640, 1280, 1280)),
            "text_encoder": _CLIP_L,
        },
        "diffusers",
        "sd_v1",
    ),
    "sd21": Architecture(
        {
            "unet": UNet((1, 1, 1, 0), 1024, True, 0, (320, 640, 1280, 1280)),
            "text_encoder": ClipText(width=1024, layers=23),
        },
        "diffusers",
        "sd_v2",
    ),
    "sdxl": Architecture(
        {
            "unet": UNet((0, 2, 10), 2048, True, 2816, (320, 640, 1280)),
            "text_encoder": _CLIP_L,
            "text_encoder_2": _CLIP_G,
        },
        "original",
        "sdxl_base_v1-0",
    ),
    "flux": Architecture({"transformer": Flux(), "text_encoder": _CLIP_L}, "original", "flux1"),
}
