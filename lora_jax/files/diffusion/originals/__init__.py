"""Names of modules in the original codes of image and video generators, as rows of data.

Kohya's trainer has its U-Net of SDXL from Stability AI, and its Flux from Black Forest Labs, so its
files have their names: "input_blocks.4.1" for "down_blocks.1.attentions.0", and one "qkv" for three
projections.
"""

import re
from collections.abc import Iterable

from lora_jax.files.diffusion.originals import flux, others
from lora_jax.files.diffusion.originals.row import Original
from lora_jax.files.diffusion.originals.unet import unet_names

__all__ = ["Original", "originals", "written"]

_Rows = dict[str, list[Original]]


def _by_part(rows: Iterable[Original]) -> _Rows:
    """Return rows by each of their parts."""
    found: _Rows = {}
    for row in rows:
        for part in row.parts:
            found.setdefault(part, []).append(row)
    return found


_FLUX = _by_part(flux.FLUX)
_TRANSFORMERS = _by_part(
    (
        *flux.FLUX,
        *flux.X_LABS,
        *flux.FLUX2,
        *others.SD3,
        *others.LUMINA,
        *others.Z_IMAGE,
        *others.WAN,
        *others.HUNYUAN,
    )
)
_BLOCK = re.compile(r"(?<=\.)\d+(?=\.)")  # the first is the number of a block


def originals(component: str, name: str) -> list[Original]:
    """Return what a module of diffusers may be in the original codes, the usual name first.

    >>> originals("unet", "down_blocks.1.attentions.0.proj_in")[0].name
    'input_blocks.4.1.proj_in'
    >>> [x.name for x in originals("transformer", "transformer_blocks.3.attn.to_out.0")][::2]
    ['double_blocks.3.img_attn.proj', 'joint_blocks.3.x_block.attn.proj']
    """
    return _find(component, name, _TRANSFORMERS)


def written(component: str, name: str) -> list[Original]:
    """Return what a module is called in files that kohya's trainer writes of SDXL and Flux.

    >>> written("transformer", "single_transformer_blocks.3.proj_mlp")[0].parts[2:]
    ('single_transformer_blocks.3.attn.to_v', 'single_transformer_blocks.3.proj_mlp')
    """
    return _find(component, name, _FLUX)


def _find(component: str, name: str, transformers: _Rows) -> list[Original]:
    if component == "unet":
        return [Original(x, (name,)) for x in unet_names(name)]
    if component != "transformer":
        return []
    number = _BLOCK.search(name)
    found = [*transformers.get(name, ())]
    if number:
        fill = lambda text: text.replace("{n}", number[0])
        for row in transformers.get(_BLOCK.sub("{n}", name, count=1), ()):
            found.append(Original(fill(row.name), tuple(map(fill, row.parts)), row.halves))
    return found
