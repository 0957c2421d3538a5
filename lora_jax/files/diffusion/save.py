"""Write adapters of an image generator as one file, with kohya's or diffusers' names."""

import os
from collections.abc import Mapping
from typing import Any, Literal, get_args

from lora_jax.core.config import LoraConfig
from lora_jax.core.errors import ConfigError
from lora_jax.core.foreign import shown_value
from lora_jax.files.diffusion import metadata as headers
from lora_jax.files.diffusion.components import COMPONENTS, WITHOUT, component_of
from lora_jax.files.diffusion.originals import written
from lora_jax.files.diffusion.read import KINDS
from lora_jax.files.diffusion.write_diffusers import to_diffusers
from lora_jax.files.diffusion.write_kohya import to_kohya
from lora_jax.files.disk import processes, safetensors_file
from lora_jax.files.disk.atomic import write_atomically
from lora_jax.files.naming import Naming
from lora_jax.files.peft.config import PeftConfig
from lora_jax.files.torch_adapters.contents import Contents, TorchBase, module_of
from lora_jax.files.torch_adapters.from_tree import check, collect, find_unloadable

Style = Literal["kohya", "diffusers"]
Layout = Literal["diffusers", "original"]


def save(
    path: str | os.PathLike,
    adapters: Any,
    naming: Naming,
    *,
    base: Any = None,
    style: Style = "kohya",
    layout: Layout | None = None,
    config: LoraConfig | PeftConfig | None = None,
    fold: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write adapters as one file that the programs of Stable Diffusion and Flux load.

    With the style "kohya" that is "lora_unet_x.lora_down.weight", "lora_up" and "alpha", for
    sd-scripts, ComfyUI, AUTOMATIC1111, Forge and diffusers; biases, norms and fully trained weights
    become LyCORIS' "diff_b", "w_norm" and "diff", their differences from the base. With "diffusers"
    it is "unet.x.lora_A.weight" with PEFT's configuration in the metadata. Where arrays span
    processes, all processes call this together, and process 0 writes.

    Args:
      path: the file, replaced atomically.
      adapters, naming, base: as for `lora_jax.peft.save`; the naming has the component before the
        names, see `load`. Without a base of several components kohya's prefix of a text encoder is
        that of SD 1.5.
      style: whose names the file has.
      layout: of kohya's names: "diffusers" ("down_blocks_1_attentions_0"), or "original" as kohya's
        trainer has them for SDXL ("input_blocks_4_1") and Flux ("double_blocks_0_img_attn_qkv",
        where the factors of q, k and v are joined, with the sum of their ranks unless they share
        A). By default Flux has the original names, other models those of diffusers.
      config: the configuration the adapters were made with, as for `lora_jax.peft.save`; only for
        the style "diffusers".
      fold: multiply the scales into B, for readers that ignore diffusers' metadata, and for
        diffusers itself, which ignores the alpha of Flux's final layer.
      metadata: further strings for the header, such as {"ss_base_model_version": "sd_v1"}.

    Raises:
      ConfigError: `style` or `layout` is not one of the above.
      StructureError: the file cannot hold these adapters; all problems are listed at once.
      OSError: the file cannot be written; the old one is kept.
      OtherProcessError: in the other processes, where process 0 raises `OSError`.
    """
    _check_options(style, layout)
    contents, model = collect(adapters, naming, base)
    check(_problems(contents, model, style))
    if fold:
        contents.factors = {name: one.fold() for name, one in contents.factors.items()}
    check(find_unloadable(contents))
    if style == "kohya":
        layouts = {name: layout or _usual_layout(name, model) for name in COMPONENTS}
        written = to_kohya(contents, model, layouts)
        tensors, header = written.tensors, headers.of_kohya(written.factors)
    else:
        tensors, configs = to_diffusers(contents, model, config)
        header = headers.of_diffusers(configs)
    data = safetensors_file.encode(tensors, header | dict(metadata or {}), source=str(path))
    processes.by_first(
        lambda: write_atomically(path, data), several=processes.span_processes(adapters, base)
    )


def _usual_layout(component: str, model: TorchBase) -> Layout:
    """Return the layout of kohya's names of a component, where none is asked for."""
    prefix = f"{component}."
    own = [x for x in model.index if x.startswith(prefix) and model.kind(x) in KINDS]
    is_flux = component == "transformer" and all(
        written(component, module_of(x).removeprefix(prefix)) for x in own
    )
    return "original" if is_flux else "diffusers"


def _check_options(style: Any, layout: Any) -> None:
    known = get_args(Style), (*get_args(Layout), None)
    for name, value, values in zip(("style", "layout"), (style, layout), known, strict=True):
        if value not in values:
            words = ", ".join(repr(x) for x in values)
            raise ConfigError(f"save: {name} must be one of {words}, got {shown_value(value)}")


def _problems(contents: Contents, model: TorchBase, style: Style) -> list[str]:
    """Return what keeps these contents out of any file, or out of one of this style."""
    every = [*contents.factors, *contents.whole, *contents.rows, *contents.experts]
    problems = [f"{name}: {WITHOUT}" for name in every if component_of(name) is None]
    others = [*contents.rows, *contents.experts]
    problems += [f"{name}: is neither a weight with factors nor fully trained" for name in others]
    problems += [
        f"{name}: is of kind {model.kind(name)!r}, which these files cannot adapt"
        for name in contents.factors
        if model.kind(name) not in KINDS
    ]
    problems += [
        f"{name}: is fully trained, which these files cannot hold"
        for name in contents.whole
        if style == "diffusers" or model.kind(name) not in (*KINDS, "")
    ]
    without = [name for name, one in contents.factors.items() if one.magnitude is None]
    if style == "diffusers" and 0 < len(without) < len(contents.factors):
        problems.append(f"only some modules have DoRA; without it: {', '.join(sorted(without))}")
    if not contents.factors and not contents.whole:
        problems.append("nothing is adapted")
    return problems
