"""The components of a pipeline, and what files call their modules."""

import re
from collections.abc import Collection, Iterator
from typing import NamedTuple


class Component(NamedTuple):
    """How files call the modules of one component.

    Attributes:
      underscored: what kohya's and LyCORIS' names begin with, the dots of the rest underscores.
      dotted: what the other names begin with, "" for nothing.
    """

    underscored: tuple[str, ...]
    dotted: tuple[str, ...]


COMPONENTS = {
    "unet": Component(("lora_unet", "lycoris", "oft_unet"), ("unet", "diffusion_model", "")),
    "transformer": Component(
        ("lora_unet", "lora_transformer", "lycoris", "oft_unet"),
        ("transformer", "diffusion_model", ""),
    ),
    "text_encoder": Component(
        ("lora_te", "lora_te1"), ("text_encoder", "text_encoders.clip_l.transformer", "")
    ),
    "text_encoder_2": Component(
        ("lora_te2",), ("text_encoder_2", "text_encoders.clip_g.transformer", "")
    ),
    "text_encoder_3": Component(
        ("lora_te3",), ("text_encoder_3", "text_encoders.t5xxl.transformer", "")
    ),
}
_BEGINNINGS = ", ".join(f"{name}." for name in COMPONENTS)
WITHOUT = f"names of a pipeline begin with {_BEGINNINGS}; see Naming.with_prefix"
#: The T5 encoder's, which is the second text encoder of Flux.
_T5, _DOTTED_T5 = "lora_te3", "text_encoders.t5xxl.transformer"


def component_of(name: str) -> str | None:
    """Return the component that a tensor of a naming belongs to, or None.

    >>> component_of("text_encoder_2.text_projection.weight"), component_of("conv_in.weight")
    ('text_encoder_2', None)
    """
    first, dot, _ = name.partition(".")
    return first if dot and first in COMPONENTS else None


def components_of(name: str) -> set[str]:
    """Return the components of which a module may be, by the beginning of a file's name.

    >>> components_of("lora_te1_text_model_encoder_layers_0_mlp_fc1")
    {'text_encoder'}
    """
    found = set()
    for component, (with_underscores, with_dots) in COMPONENTS.items():
        starts = [f"{x}_" for x in with_underscores] + [f"{x}." for x in with_dots if x]
        if name.startswith(tuple(starts)):
            found.add(component)
    return found | ({"text_encoder_2"} if name.startswith((f"{_T5}_", f"{_DOTTED_T5}.")) else set())


def underscored(component: str, among: Collection[str]) -> tuple[str, ...]:
    """Return what kohya's names of a component begin with, in a pipeline of these components.

    The first is the one to write.
    """
    names = COMPONENTS[component].underscored
    if _is_t5(component, among):
        return (_T5, *names)
    is_one_of_several = component == "text_encoder" and not {
        "text_encoder_2",
        "transformer",
    }.isdisjoint(among)
    return names[::-1] if is_one_of_several else names


def dotted(component: str, among: Collection[str]) -> tuple[str, ...]:
    """Return what the other names begin with, in a pipeline of these components."""
    names = COMPONENTS[component].dotted
    return (*names, _DOTTED_T5) if _is_t5(component, among) else names


def _is_t5(component: str, among: Collection[str]) -> bool:
    """Return whether this is the second text encoder of a pipeline such as Flux's."""
    return (
        component == "text_encoder_2" and "transformer" in among and "text_encoder_3" not in among
    )


def spellings(name: str) -> Iterator[str]:
    """Yield a module's name and what older files of diffusers call it.

    >>> [*spellings("x.attn1.to_out.0")]
    ['x.attn1.to_out.0', 'x.attn1.processor.to_out.0', 'x.attn1.to_out', 'x.attn1.processor.to_out']
    >>> [*spellings("text_model.encoder.layers.0.self_attn.q_proj")][1:]
    ['text_model.encoder.layers.0.self_attn.to_q']
    """
    yield name
    processor = re.sub(r"\.(attn\d?)\.(?=to_)", r".\1.processor.", name)
    found = [processor] if processor != name else []
    if name.endswith(".to_out.0"):
        found += [x.removesuffix(".0") for x in (name, *found)]
    text = re.sub(r"\.self_attn\.(q|k|v|out)_proj$", r".self_attn.to_\1", name)
    yield from [*found, text] if text != name else found
