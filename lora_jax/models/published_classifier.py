"""Sequence classifiers as transformers writes them: names, configuration, labels."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import ModelFileError
from lora_jax.core.foreign import shown
from lora_jax.files import naming as names
from lora_jax.files.naming import Entry, Naming
from lora_jax.models.classifier import Classifier, Pooling
from lora_jax.models.pretrained import Pretrained
from lora_jax.models.weights.family import ClassifierHead, Family

SUFFIX = "ForSequenceClassification"  # of the classes in transformers


#: The parameters of a decoder's own head.
_UNUSED = {"lm_head.weight": "kernel", "lm_head.bias": "bias"}


def _with_prefix(path: str | tuple[str, ...]) -> str | tuple[str, ...]:
    add = lambda one: f"encoder/{one}"
    return add(path) if isinstance(path, str) else tuple(map(add, path))


def naming_of_classifier(family: Family) -> Naming:
    """Return transformers' names of a `Classifier`'s parameters, on a model of a family."""
    head = head_of_family(family)
    rows = [
        dataclasses.replace(entry, path=_with_prefix(entry.path))
        for entry in family.naming(()).with_prefix(head.prefix).entries
        if entry.torch not in _UNUSED
    ]
    # it may be in the tree, but a classifier does not use it: no kind, so no adapter
    rows += [Entry(name, f"encoder/head/{leaf}") for name, leaf in _UNUSED.items()]
    modules = {"head": head.module} | ({"pooler": head.pooler} if head.pooler else {})
    if head.norm:
        rows += [
            Entry(f"{head.norm}.{name}", f"pooler/{leaf}") for name, leaf in _OF_A_NORM.items()
        ]
    for path, module in modules.items():
        rows += [
            Entry(f"{module}.weight", f"{path}/kernel", "linear"),
            Entry(f"{module}.bias", f"{path}/bias"),
        ]
    return Naming(tuple(rows))


def head_of_family(family: Family, settings: Mapping[str, Any] | None = None) -> ClassifierHead:
    """Return what the classifiers of a family have in common.

    Args:
      family: of the base.
      settings: its parsed config.json, which may decide the pooling; without it the names are
        right.

    Raises:
      ModelFileError: there are none, or the settings say what is not supported.
    """
    if family.classifier is None:
        raise ModelFileError(f"{family.stem} models are not supported as classifiers of texts")
    try:
        return family.classifier if settings is None else family.classifier.of(settings)
    except ValueError as error:
        raise ModelFileError(f"config.json: {error}") from None


def classifier_of(model: Pretrained, slots: int, pooling: Pooling | None = None) -> Classifier:
    """Return the classifier on a model, as a function of its parameters.

    Args:
      model: the base.
      slots: maximum number of texts per row.
      pooling: what represents a text; None for what transformers has.
    """
    run = model.apply
    hidden = run if model.kind == "encoder" else lambda *inputs: run(*inputs, method="hidden")
    head = head_of_family(model.family, model.settings)
    return Classifier(hidden, slots, pooling or head.pooling, head.activation, head.epsilon)


def new_pooler(head: ClassifierHead, width: int, seed: int) -> dict[str, Any]:
    """Return a layer before the head for a base whose file has none: N(0, 1/width), in float32."""
    kernel = jax.random.normal(jax.random.key(seed), (width, width)) / width**0.5
    made = {"kernel": kernel}
    if head.pooler_bias:
        made["bias"] = jnp.zeros(width)
    if head.norm:
        made["scale"] = jnp.ones(width)
    if head.norm and head.norm_bias:
        made["shift"] = jnp.zeros(width)
    return made


def pooler_of(model: Pretrained) -> dict[str, Any] | None:
    """Return the layer before the head that the model's file has, as float32 parameters.

    None if the file has not all of it.
    """
    head = model.family.classifier
    if head is None or not head.pooler:
        return None
    linear = _tensors(model, head, head.pooler, _OF_A_LAYER)
    if not head.norm:
        return linear
    norm = _tensors(model, head, head.norm, _OF_A_NORM)
    return None if linear is None or norm is None else linear | norm


def head_of(model: Pretrained) -> dict[str, Any] | None:
    """Return the classifier's head in the model's file, as float32 parameters, or None."""
    head = head_of_family(model.family)
    return _tensors(model, head, head.module, _OF_A_LAYER)


#: The name of a tensor in its module -> its name here.
_OF_A_LAYER = {"weight": "kernel", "bias": "bias"}
_OF_A_NORM = {"weight": "scale", "bias": "shift"}


def _tensors(
    model: Pretrained, head: ClassifierHead, module: str, names: Mapping[str, str]
) -> dict[str, Any] | None:
    """Return a module's tensors in the model's file, None without a weight."""
    own = module.removeprefix(head.prefix)
    found = {
        ours: jnp.asarray(np.asarray(model.rest[name]).T, jnp.float32)
        for torch, ours in names.items()
        for name in (f"{own}.{torch}", f"{head.prefix}{own}.{torch}")
        if name in model.rest
    }
    return found if names["weight"] in found else None


def labels_of(settings: Mapping[str, Any], classes: int) -> list[str]:
    """Return the names of a classifier's classes that a config.json has, or their numbers.

    Raises:
      ModelFileError: the head is for another task than one label per text.
    """
    task = settings.get("problem_type")
    if task not in (None, "single_label_classification") or classes < 2:
        raise ModelFileError(
            f"problem_type {shown(task or 'regression')} with num_labels {classes} is not "
            "supported, only classifiers that choose one of several labels"
        )
    given = settings.get("id2label")
    given = given if isinstance(given, dict) else {}
    found = [given.get(str(i)) for i in range(classes)]
    names = [name for name in found if isinstance(name, str)]
    is_usable = len(names) == len(given) == classes and len(set(names)) == classes
    return names if is_usable else [str(i) for i in range(classes)]


def published(
    model: Pretrained, params: Mapping[str, Any], labels: Sequence[Any], pad_id: int | None
) -> Pretrained:
    """Return a classifier as `models.save` writes it for transformers.

    Args:
      model: the base.
      params: of a `Classifier` with the pooling of the model's family, plain arrays.
      labels: label i is class i.
      pad_id: the tokenizer's padding token, by which transformers finds the last token of each text
        in a batch, for a decoder.
    """
    family = model.family
    tensors = names.to_torch(naming_of_classifier(family), {**params, "encoder": {}})
    settings = {key: value for key, value in model.settings.items() if key != "num_labels"}
    texts = [str(label) for label in labels]
    settings |= {
        "architectures": [f"{family.stem}{SUFFIX}"],
        "id2label": {str(i): text for i, text in enumerate(texts)},
        "label2id": {text: i for i, text in enumerate(texts)},
        "problem_type": "single_label_classification",
    }
    if settings.get("pad_token_id") is None and pad_id is not None:
        settings["pad_token_id"] = pad_id
    return dataclasses.replace(
        model,
        params={name: x for name, x in params["encoder"].items() if name != "head"},
        naming=family.naming(()).with_prefix(head_of_family(family).prefix),
        settings=settings,
        rest=tensors,
    )


def renamed(family: Family, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return a base's tensors under the names that they have in its classifier's file."""
    prefix, found = head_of_family(family).prefix, {}
    for name, tensor in tensors.items():
        new = name.replace(".LayerNorm.gamma", ".LayerNorm.weight")
        new = new.replace(".LayerNorm.beta", ".LayerNorm.bias")
        found[prefix + new.removeprefix(prefix)] = tensor
    return found
