"""What loading, saving and classifying must know of the models of one `model_type`."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flax import linen as nn

from lora_jax.files.naming import Naming
from lora_jax.models.classifier import Pooling

#: What a model computes: hidden states of a text, or logits of the token after each token.
Kind = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class ClassifierHead:
    """What transformers' classifiers of one family have in common.

    Attributes:
      pooling: the token that represents a text.
      module: of the linear layer.
      prefix: before the model's own tensor names.
      pooler: the module of the layer before the head, "" where there is none.
      bias: whether the head has a bias.
    """

    pooling: Pooling
    module: str
    prefix: str = ""
    pooler: str = ""
    bias: bool = False


@dataclass(frozen=True)
class Options:
    """What a caller, not the file, decides of a module."""

    dtype: str = "float32"
    scan: bool = False
    remat: bool | str = False


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
      sizes: the keys of config.json that are an axis of some tensor, or a part of one.
      classifier: None where classifiers are not supported.
      kept: regexes of tensors that are not parameters of the model, but kept and saved with it.
      dropped: regexes of tensors that follow from the rest.
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

    @property
    def architecture(self) -> str:
        """The class in transformers that reads what `models.save` writes."""
        return f"{self.stem}{self.model_class}"
