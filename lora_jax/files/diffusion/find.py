"""Find the published model whose names a file has, where no base is given."""

from lora_jax.core.errors import AdapterFileError
from lora_jax.core.foreign import shown
from lora_jax.files.diffusion import fields
from lora_jax.files.diffusion.adapter_file import DiffusionFile
from lora_jax.files.diffusion.architectures import ARCHITECTURES
from lora_jax.files.diffusion.architectures.find import KNOWN
from lora_jax.files.diffusion.index import Index, Target


def find_architecture(file: DiffusionFile) -> tuple[str, list[str]]:
    """Return the published model that most of a file's modules fit, and its components in the file.

    Names with underscores are looked up among the model's modules. Where several have them all, the
    shapes decide.

    Raises:
      AdapterFileError: none has any of the names.
    """
    modules, _ = fields.group(file.tensors)
    best, found = (0, 0), ("", [""])
    for name, architecture in ARCHITECTURES.items():
        index = Index(architecture.modules)
        targets = {module: index.look_up(module) for module in modules}
        known = {module: one for module, one in targets.items() if isinstance(one, Target)}
        fitting = sum(
            _fits(modules[module].tensors, [architecture.modules[x].shape for x in target.modules])
            for module, target in known.items()
        )
        if (len(known), fitting) > best:
            components = dict.fromkeys(x.modules[0].partition(".")[0] for x in known.values())
            best, found = (len(known), fitting), (name, list(components))
    if not found[0]:
        first = shown(next(iter(modules), "") or next(iter(file.tensors)))
        raise AdapterFileError(
            f"{file.source}: {first} is a module of none of {KNOWN}; read it in Python with "
            "lora.diffusion.load and the naming of its model"
        )
    return found


def _fits(tensors: dict, shapes: list) -> bool:
    """Return whether plain factors have the numbers of inputs and outputs of some modules."""
    down, up = tensors.get("down"), tensors.get("up")
    if down is None or up is None or down.ndim < 2 or not up.ndim:
        return True
    return down.shape[1] == shapes[0][1] and len(up) == sum(shape[0] for shape in shapes)
