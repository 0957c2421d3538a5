"""Find and load sequence classifiers: a model with such a head, or an adapter with one."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import lora_jax as lora
from lora_jax import models
from lora_jax.cli import sources
from lora_jax.cli.fit import EXACT, Fit
from lora_jax.core.errors import AdapterFileError, ModelFileError
from lora_jax.core.foreign import shown
from lora_jax.files import kinds, native, peft
from lora_jax.files.disk import safetensors_file
from lora_jax.files.naming import Naming
from lora_jax.models import hf_directory, published_classifier
from lora_jax.models.classifier import Classifier, Pooling
from lora_jax.models.families import FAMILIES, family_of
from lora_jax.models.pretrained import Pretrained

#: Keys of the metadata that `train` writes into a classifier's adapter.
LABELS, POOLING = "labels", "pooling"
_HEADS = tuple({f.classifier.module: None for f in FAMILIES.values() if f.classifier})
_KERNEL = "head/kernel"
_TASK = "SEQ_CLS"  # PEFT's name of the task


@dataclasses.dataclass(frozen=True)
class LoadedClassifier:
    """A classifier, with adapters or none.

    Attributes:
      model: the base.
      params: of the `Classifier`, joined with the adapters.
      labels: label i is class i.
      pooling: as in `Classifier`.
    """

    model: Pretrained
    params: Any
    labels: tuple[Any, ...]
    pooling: Pooling

    def function(self, slots: int) -> Classifier:
        """Return the classifier as a function of its parameters, for `slots` texts per row."""
        return published_classifier.classifier_of(self.model, slots, self.pooling)


def labels_of(adapter: kinds.Found) -> list[Any] | None:
    """Return the labels of a classifier's adapter that `lora-jax train` wrote; None of any other.

    Only the header is read.
    """
    if adapter.kind != kinds.NATIVE:
        return None
    labels = lora.read_metadata(adapter.path)["metadata"].get(LABELS)
    return labels if isinstance(labels, list) else None


def find(model: kinds.Found, adapter: Path | None) -> str:
    """Return the path that makes this a classifier, the adapter's or the model's, or "".

    Only headers are read.
    """
    if not _is_of_texts(model):
        return ""
    if adapter is not None:
        found = kinds.adapter(adapter)
        if found.kind == kinds.NATIVE:
            header = lora.read_metadata(found.path)
            if LABELS in header["metadata"] and _KERNEL in header["layouts"]:
                return str(adapter)
        elif found.kind == kinds.PEFT and _is_for_classifier(found.path):
            return str(adapter)
    if model.kind != kinds.CHECKPOINT:
        return ""
    return str(model.path) if _is_classifier(model.path) else ""


def _is_of_texts(model: kinds.Found) -> bool:
    if model.kind != kinds.CHECKPOINT:
        return True
    model_type = hf_directory.read_config(model.path).get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    return family is None or family.kind in ("encoder", "decoder")


def _is_for_classifier(directory: Path) -> bool:
    """Return whether an adapter of PEFT says so, or has a whole head without saying what for.

    Raises:
      AdapterFileError: its head is for another task, such as labels of tokens.
    """
    task = peft.read_config(directory).task_type
    names = safetensors_file.headers(directory / peft.TENSORS).tensors
    has_head = any(_is_of_head(name, head) for head in _HEADS for name in names)
    if has_head and task not in (None, _TASK):
        raise AdapterFileError(
            f"{directory}: has a head for the task {shown(task)}; of tasks with such a head only "
            f"the classification of whole texts ({_TASK}) is supported"
        )
    return has_head or task == _TASK


def _is_of_head(name: str, head: str) -> bool:
    """Return whether a tensor of PEFT is one of a head's own, not a factor."""
    return name.startswith(f"base_model.model.{head}.") and ".lora_" not in name


def _is_classifier(directory: Path) -> bool:
    classes = hf_directory.read_config(directory).get("architectures")
    return isinstance(classes, list) and any(
        isinstance(name, str) and name.endswith(published_classifier.SUFFIX) for name in classes
    )


def naming_for_peft(model: kinds.Found, adapter: kinds.Found) -> Naming | None:
    """Return the names of a lora_jax classifier's parameters in PEFT's file; None if it is none.

    Raises:
      AdapterFileError: its head reads the mean over a text's tokens.
    """
    header = lora.read_metadata(adapter.path)
    if LABELS not in header["metadata"] or _KERNEL not in header["layouts"]:
        return None
    settings: dict[str, Any] = {"model_type": "llama"}
    if model.kind == kinds.CHECKPOINT:
        settings = hf_directory.read_config(model.path)
    family = family_of(settings)
    head = published_classifier.head_of_family(family, settings)
    if header["metadata"].get(POOLING) != head.pooling:
        raise AdapterFileError(
            f"{adapter.path}: its head reads the mean over a text's tokens, which no classifier of "
            "transformers does; train with --pooling model to use it there"
        )
    return published_classifier.naming_of_classifier(family)


def load(
    model: kinds.Found,
    adapter: Path | None = None,
    dtype: str | None = None,
    fit: Fit = EXACT,
    *,
    in_files: bool = False,
    quantize: str | None = None,
    as_stored: bool = False,
) -> LoadedClassifier:
    """Load a classifier; the arguments are those of `sources.load`.

    Raises:
      LoraError: a part cannot be read, or the parts do not fit.
    """
    found = None if adapter is None else kinds.adapter(adapter)
    scan = found is not None and sources.is_stacked(found)
    if found is not None:
        fit.refuse_unused(found)
    options: Any = {"in_files": in_files, "quantize": quantize, "as_stored": as_stored}
    base = sources.load_model(model, dtype, scan=scan, **options)
    if found is not None and found.kind == kinds.NATIVE:
        header = lora.read_metadata(found.path)
        if _KERNEL in header["layouts"]:
            return _trained_here(base, found, header["metadata"])
    return _published(base, model, found, fit)


def _trained_here(
    base: Pretrained, adapter: kinds.Found, metadata: dict[str, Any]
) -> LoadedClassifier:
    """Load an adapter that `lora-jax train` wrote."""
    file = native.read_file(adapter.path)
    shapes = {
        path: node.value.shape
        for path, node in file.nodes.items()
        if isinstance(node, lora.TrainedLeaf) and path.startswith(("head/", "pooler/"))
    }
    params: dict[str, Any] = {"encoder": dict(base.params)}
    if not any(p.startswith("encoder/head/") for p in [*file.nodes, *file.header["base"]]):
        params["encoder"].pop("head", None)  # only older files have a decoder's own head
    if any(path.startswith("pooler/") for path in [*shapes, *file.header["base"]]):
        params["pooler"] = published_classifier.pooler_of(base) or {}
    for path, shape in shapes.items():  # the values are the adapter's
        module, name = path.split("/")
        params.setdefault(module, {}).setdefault(name, jnp.zeros(shape))
    adapters = lora.load(adapter.path, sources.as_trained(adapter, params))
    labels, pooling = metadata.get(LABELS), metadata.get(POOLING, "mean")
    classes = params["head"]["kernel"].shape[1]
    if not isinstance(labels, list) or len(labels) != classes:
        raise AdapterFileError(f"{adapter.path}: has no list of {classes} labels in its metadata")
    if pooling not in ("mean", "first", "last"):
        raise AdapterFileError(f"{adapter.path}: the pooling {pooling!r:.40} is unknown")
    return LoadedClassifier(base, lora.join(params, adapters), tuple(labels), pooling)


def _published(
    base: Pretrained, model: kinds.Found, adapter: kinds.Found | None, fit: Fit
) -> LoadedClassifier:
    """Load a classifier of transformers, or the adapter that PEFT wrote for one."""
    head = published_classifier.head_of_family(base.family, base.settings)
    linear = published_classifier.head_of(base)
    file = None if adapter is None else _peft_file(adapter, fit)
    if file is not None and not head.prefix:
        base = models.resize_for_adapter(base, file)
    given = None if file is None else _head_in(file, head.module)
    if given is not None:
        linear = {"kernel": jnp.zeros(given[::-1])}
        if head.bias:
            linear["bias"] = jnp.zeros(given[0])
    if linear is None:
        raise ModelFileError(f"{model.path}: has no {head.module}.weight, a classifier's head")
    params = {"encoder": {k: x for k, x in base.params.items() if k != "head"}, "head": linear}
    if head.pooler:
        pooler = published_classifier.pooler_of(base)
        if file is not None and _head_in(file, head.pooler) is not None:  # the values are its own
            width = linear["kernel"].shape[0]
            pooler = pooler or published_classifier.new_pooler(head, width, 0)
        if pooler is None:
            raise ModelFileError(
                f"{model.path}: has no {head.pooler}.weight, which its classifier needs"
            )
        params["pooler"] = pooler
    naming = published_classifier.naming_of_classifier(base.family)
    if file is not None:
        adapters = peft.fit(file, params, naming, strict=fit.strict, residual=fit.residual)
        params = lora.join(params, adapters)
    elif adapter is not None:
        raise AdapterFileError(
            f"{adapter.path}: a {kinds.DESCRIPTIONS[adapter.kind]} without a head; a classifier "
            "needs one of PEFT, or one that lora-jax train wrote"
        )
    classes = linear["kernel"].shape[1]
    labels = published_classifier.labels_of(base.settings, classes)
    return LoadedClassifier(base, params, tuple(labels), head.pooling)


def _peft_file(adapter: kinds.Found, fit: Fit) -> peft.PeftFile | None:
    return sources.read_peft(adapter, fit) if adapter.kind == kinds.PEFT else None


def _head_in(file: peft.PeftFile, head: str) -> tuple[int, int] | None:
    """Return the shape of the head's weight in an adapter, `(classes, width)`."""
    shapes = [
        x.shape
        for name, x in file.tensors.items()
        if _is_of_head(name, head) and name.endswith("weight")
    ]
    return next((shape for shape in shapes if len(shape) == 2), None)
