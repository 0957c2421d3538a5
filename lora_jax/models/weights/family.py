"""What loading, saving and classifying must know of the models of one `model_type`."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.files.naming import Naming
from lora_jax.models.classifier import Pooling

#: What a model computes: hidden states of a text, logits of the token after each token, features
#: or classes of an image, or logits of the tokens of a text that is spoken.
Kind = Literal["encoder", "decoder", "vision", "speech"]


def _nothing(given: Any) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class ClassifierHead:
    """What transformers' classifiers of one family have in common.

    Attributes:
      pooling: the token that represents a text.
      module: of the linear layer.
      prefix: before the model's own tensor names.
      pooler: the module of the layer before the head, "" where there is none.
      bias: whether the head has a bias.
      activation: behind the pooler, as in `Classifier`.
      pooler_bias: whether the pooler has a bias.
      norm: the module of a norm behind that, "" where there is none.
      norm_bias: whether that has a bias.
      epsilon: of the norm.
      options: which of these a parsed config.json decides.
    """

    pooling: Pooling
    module: str
    prefix: str = ""
    pooler: str = ""
    bias: bool = False
    activation: str = "tanh"
    pooler_bias: bool = True
    norm: str = ""
    norm_bias: bool = False
    epsilon: float = 1e-5
    options: Callable[[Mapping[str, Any]], Mapping[str, Any]] = _nothing

    def of(self, settings: Mapping[str, Any]) -> "ClassifierHead":
        """Return the head of a model with a parsed config.json."""
        return dataclasses.replace(self, **self.options(settings))


@dataclass(frozen=True)
class Options:
    """What a caller, not the file, decides of a module."""

    dtype: str = "float32"
    scan: bool = False
    remat: bool | str = False


def _tokens(module: nn.Module) -> Mapping[str, Any]:
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return {"ids": ids, "segments": ids}


@dataclass(frozen=True)
class Family:
    """Models of one `model_type`.

    Attributes:
      kind: what they compute.
      stem: how the names of transformers' classes begin, such as "Llama".
      model_class: how the name of the class ends that reads what `models.save` writes.
      module: makes the Flax module of a parsed config.json; `ValueError` for what it cannot be.
      naming: Hugging Face's names of the leaves, given the tensor names of a file, if there is one.
      embedding: the path of the token embedding, by parts.
      sizes: the keys of config.json that are an axis of some tensor, or a part of one; "a.b" is
        key b in object a.
      classifier: None where classifiers are not supported.
      kept: regexes of tensors that are not parameters of the model, but kept and saved with it.
      dropped: regexes of tensors that follow from the rest.
      inputs: the shapes and dtypes of the arguments that a module creates its parameters from.
      layers: the keys of config.json that are a number of layers; "a.b" is key b in object a.
      by_tensors: the settings that the tensor names of a file decide, where config.json does not.
      in_files: the names of the leaves in the files of models, where they differ from those of the
        modules, which adapters have; None where they are the same.
    """

    kind: Kind
    stem: str
    model_class: str
    module: Callable[[Mapping[str, Any], Options], nn.Module]
    naming: Callable[[Collection[str]], Naming]
    embedding: tuple[str, ...]
    sizes: tuple[str, ...]
    classifier: ClassifierHead | None = None
    kept: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    inputs: Callable[[nn.Module], Mapping[str, Any]] = _tokens
    layers: tuple[str, ...] = ("num_hidden_layers",)
    by_tensors: Callable[[Collection[str]], Mapping[str, Any]] = _nothing
    in_files: Callable[[Collection[str]], Naming] | None = None

    @property
    def architecture(self) -> str:
        """The class in transformers that reads what `models.save` writes."""
        return f"{self.stem}{self.model_class}"
