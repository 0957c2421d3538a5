"""Find the published model that names and shapes are of, where no base says it."""

from collections.abc import Collection, Iterable, Iterator, Mapping

from lora_jax.core.errors import AdapterFileError
from lora_jax.core.foreign import shown
from lora_jax.files.diffusion.architectures.modules import NORM, Module
from lora_jax.files.diffusion.architectures.table import ARCHITECTURES
from lora_jax.files.torch_adapters.file_contents import ImpliedWeight

#: Whose modules are known.
KNOWN = "SD 1.5, SD 2.1, SDXL and Flux, the models that are known here"


def weights(architecture: str, components: Collection[str]) -> dict[str, ImpliedWeight]:
    """Return the kind and shape of every tensor of some components, the names with these.

    >>> weights("sd15", ["unet"])["unet.conv_in.weight"]
    ('conv', (320, 4, 3, 3))
    """
    model = ARCHITECTURES[architecture]
    return {
        f"{component}.{name}": found
        for component in components
        for name, found in _tensors(model.components[component].modules())
    }


def _tensors(modules: Iterable[Module]) -> Iterator[tuple[str, ImpliedWeight]]:
    """Yield the tensors of modules by name."""
    for module in modules:
        kind = "" if module.kind == NORM else module.kind
        yield f"{module.name}.weight", (kind, module.shape)
        if module.bias:
            yield f"{module.name}.bias", ("", module.shape[:1])


def find_component(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str]:
    """Return the architecture and component that have tensors of these names and shapes.

    The component is "" where the names begin with components.

    Raises:
      AdapterFileError: none has them all; the message names one that is missing.

    >>> find_component({"text_model.encoder.layers.0.mlp.fc1.weight": (5120, 1280)})
    ('sdxl', 'text_encoder_2')
    """
    lacking = list(shapes)
    for architecture, model in ARCHITECTURES.items():
        known = weights(architecture, model.components)
        for component in ("", *model.components):
            prefix = f"{component}." if component else ""
            missing = [
                name
                for name, shape in shapes.items()
                if prefix + name not in known or known[prefix + name][1] != shape
            ]
            if not missing:
                return architecture, component
            lacking = min(lacking, missing, key=len)
    raise AdapterFileError(
        f"{shown(lacking[0])} of shape {shapes[lacking[0]]} is in no component of {KNOWN}"
    )
