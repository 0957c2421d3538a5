"""The encoders of texts: one row per `model_type` of config.json."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from flax import linen as nn

from lora_jax.core.foreign import shown_value
from lora_jax.files.naming import Naming
from lora_jax.models.activations import ACTIVATIONS
from lora_jax.models.encoder import bert_naming, modernbert_naming
from lora_jax.models.encoder.bert import Bert, BertConfig
from lora_jax.models.encoder.modernbert import ModernBert, ModernBertConfig
from lora_jax.models.weights.family import ClassifierHead, Family, Options

_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"),
    "max_position_embeddings",
    "type_vocab_size",
)


def _bert(settings: Mapping[str, Any], options: Options) -> nn.Module:
    return Bert(BertConfig.from_json(settings, scan=options.scan, remat=options.remat))


def _modernbert(settings: Mapping[str, Any], options: Options) -> nn.Module:
    config = ModernBertConfig.from_json(settings, scan=options.scan, remat=options.remat)
    return ModernBert(config)


def _roberta_naming(names: Collection[str] = ()) -> Naming:
    return bert_naming.naming(names, "roberta.")


def _modernbert_head(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a ModernBERT's config.json says of its classifier."""
    poolings = {"cls": "first", "mean": "mean"}
    pooling = settings.get("classifier_pooling", "cls")
    activation = settings.get("classifier_activation", "gelu")
    if not isinstance(pooling, str) or pooling not in poolings:
        raise ValueError(
            f"classifier_pooling {shown_value(pooling)} is not one of {sorted(poolings)}"
        )
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(
            f"classifier_activation {shown_value(activation)} is not one of {sorted(ACTIVATIONS)}"
        )
    return {
        "pooling": poolings[pooling],
        "activation": activation,
        "pooler_bias": bool(settings.get("classifier_bias")),
        "norm_bias": bool(settings.get("norm_bias")),
        "epsilon": settings.get("norm_eps", 1e-5),
    }


#: A row of RoBERTa but for `stem`. Its classifier has one more layer with tanh, which is not in the
#: files of the base.
_roberta = partial(
    Family,
    kind="encoder",
    model_class="Model",
    module=_bert,
    naming=_roberta_naming,
    embedding=("embeddings", "word", "embedding"),
    sizes=_SIZES,
    classifier=ClassifierHead(
        "first", "classifier.out_proj", "roberta.", "classifier.dense", bias=True
    ),
    kept=(
        r"(roberta\.)?embeddings\.(position|token_type)_ids",
        r"(roberta\.)?pooler\..*",
        r"lm_head\..*",
        r"classifier\..*",
    ),
)

#: `model_type` in config.json -> what is known of it.
ENCODERS: dict[str, Family] = {
    "bert": Family(
        kind="encoder",
        stem="Bert",
        model_class="Model",
        module=_bert,
        naming=bert_naming.naming,
        embedding=("embeddings", "word", "embedding"),
        sizes=_SIZES,
        classifier=ClassifierHead("first", "classifier", "bert.", "bert.pooler.dense", bias=True),
        kept=(
            r"(bert\.)?embeddings\.position_ids",
            r"(bert\.)?pooler\..*",
            r"cls\..*",
            r"classifier\..*",
        ),
    ),
    "roberta": _roberta(stem="Roberta"),
    "xlm-roberta": _roberta(stem="XLMRoberta"),
    "modernbert": Family(
        kind="encoder",
        stem="ModernBert",
        model_class="Model",
        module=_modernbert,
        naming=modernbert_naming.naming,
        embedding=("embeddings", "word", "embedding"),
        sizes=("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"),
        classifier=ClassifierHead(
            "first",
            "classifier",
            modernbert_naming.PREFIX,
            "head.dense",
            bias=True,
            activation="gelu",
            pooler_bias=False,
            norm="head.norm",
            options=_modernbert_head,
        ),
        kept=(r"head\..*", r"decoder\..*", r"classifier\..*"),
    ),
}
