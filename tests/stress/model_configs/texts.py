"""Encoders of texts, with the heads that transformers has for them."""

import dataclasses
from typing import Any

import jax
import numpy as np
import torch
import transformers

from lora_jax import models
from lora_jax.models import published_classifier
from tests.stress.model_configs.case import Arrays, Case, run
from tests.stress.model_configs.draw import ACTIVATIONS, Draw, randomized

_SIZES = {
    "vocab_size": (40, 37),
    "hidden_size": (16, 24),
    "intermediate_size": (24, 7),
    "num_attention_heads": (2, 4, 1),
    "num_hidden_layers": (2, 1, 3),
}
HEADS = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForMaskedLM")


def bert(draw: Draw) -> Case:
    """Return a random BERT."""
    fields = draw.fields(
        {
            **_SIZES,
            "hidden_act": ("gelu", *ACTIVATIONS),
            "max_position_embeddings": (20, 32),
            "type_vocab_size": (2, 1, 3),
            "layer_norm_eps": (1e-12, 1e-5, 0.1),
            "pad_token_id": (0, 3),
            "is_decoder": (False, False, False, False, True),
        }
    )
    return _case(draw, "Bert", fields)


def roberta(draw: Draw) -> Case:
    """Return a random RoBERTa."""
    return _case(draw, "Roberta", _of_roberta(draw))


def xlm_roberta(draw: Draw) -> Case:
    """Return a random XLM-RoBERTa."""
    return _case(draw, "XLMRoberta", _of_roberta(draw))


def _of_roberta(draw: Draw) -> dict[str, Any]:
    table = {
        **_SIZES,
        "hidden_act": ("gelu", *ACTIVATIONS),
        "max_position_embeddings": (34, 20),
        "type_vocab_size": (1, 2),
        "layer_norm_eps": (1e-5, 1e-12, 0.1),
        "pad_token_id": (1, 0, 3),
        "is_decoder": (False, False, False, False, True),
    }
    return draw.fields(table)


def modernbert(draw: Draw) -> Case:
    """Return a random ModernBERT."""
    fields = draw.fields(
        {
            **_SIZES,
            "hidden_activation": ("gelu", *ACTIVATIONS),
            "norm_eps": (1e-5, 1e-12, 0.1),
            "norm_bias": (False, True),
            "attention_bias": (False, True),
            "mlp_bias": (False, True),
            "local_attention": (6, 1, 2, 5, 128),
            "classifier_pooling": ("cls", "mean"),
            "classifier_activation": ("gelu", "tanh", "relu", "silu", "gelu_new"),
            "classifier_bias": (False, True),
            "decoder_bias": (True, False),
            "pad_token_id": (0, 3),
        }
    )
    fields["num_hidden_layers"] = draw.field("num_hidden_layers", 4, 2, 7)
    fields["max_position_embeddings"] = 64
    how = draw.field("layer_types", "usual", "every", "given", "rope_scaling")
    if how == "every":
        fields["global_attn_every_n_layers"] = draw.random.choice([1, 2, 5])
    elif how == "given":
        kinds = ["full_attention", "sliding_attention"]
        fields["layer_types"] = draw.random.choices(kinds, k=fields["num_hidden_layers"])
    elif how == "rope_scaling":
        fields["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
        draw.changed["rope_scaling"] = fields["rope_scaling"]
    if draw.field("thetas", False, True):
        fields |= {"global_rope_theta": 1000.0, "local_rope_theta": 200.0}
    special = {f"{name}_token_id": 1 for name in ("bos", "eos", "cls", "sep")}
    return _case(draw, "ModernBert", {**fields, **special}, has_types=False)


def _case(draw: Draw, stem: str, fields: dict[str, Any], has_types: bool = True) -> Case:
    head = draw.random.choice(HEADS)
    if "Classification" in head:
        fields["num_labels"] = draw.field("num_labels", 3, 2, 5)
        if head == "ForSequenceClassification":
            fields["problem_type"] = draw.field(
                "problem_type", None, "single_label_classification", "regression",
                "multi_label_classification",
            )  # fmt: skip
    config = getattr(transformers, f"{stem}Config")(**fields)
    made = getattr(transformers, stem + head)
    model = randomized(made._from_config(config, attn_implementation="eager"), 0)
    draw.changed["num_labels"] = config.num_labels
    return Case(model, _inputs(draw, fields, has_types), _theirs, _ours, draw)


def _inputs(draw: Draw, fields: dict[str, Any], has_types: bool) -> Arrays:
    made, length = draw.arrays, draw.random.randrange(1, 13)
    ids = made.integers(4, fields["vocab_size"], (3, length)).astype(np.int32)
    mask = np.ones_like(ids)
    for row in (1, 2):
        mask[row, made.integers(1, length + 1) :] = 0
    ids[mask == 0] = fields["pad_token_id"]
    found = {"ids": ids, "mask": mask}
    if has_types and draw.random.random() < 0.5:
        found["types"] = made.integers(0, fields["type_vocab_size"], ids.shape).astype(np.int32)
    return found


def _theirs(model: Any, inputs: Arrays) -> Arrays:
    given = {"input_ids": inputs["ids"], "attention_mask": inputs["mask"]}
    given |= {"token_type_ids": inputs["types"]} if "types" in inputs else {}
    tensors = {name: torch.from_numpy(np.asarray(x, np.int64)) for name, x in given.items()}
    base = getattr(model, model.base_model_prefix, model)
    found = {"hidden": base(**tensors).last_hidden_state.numpy() * inputs["mask"][..., None]}
    if _classifies(type(model).__name__):
        found["logits"] = model(**tensors).logits.numpy()
    return found


def _classifies(architecture: str) -> bool:
    return architecture.endswith("ForSequenceClassification")


def _ours(model: models.Pretrained, inputs: Arrays) -> Arrays:
    ids, mask = inputs["ids"], inputs["mask"]
    types = (inputs["types"],) if "types" in inputs else ()
    found = {"hidden": run(model.apply, model.params, ids, mask, *types) * mask[..., None]}
    if not _classifies(model.settings["architectures"][0]):
        return found
    head = published_classifier.head_of(model)
    assert head is not None
    published_classifier.labels_of(model.settings, head["kernel"].shape[1])
    classifier = published_classifier.classifier_of(model, 1)
    pooler = published_classifier.pooler_of(model)
    params = {"encoder": model.params, "head": head} | ({"pooler": pooler} if pooler else {})
    if types:  # packed texts have none
        classifier = jax.tree_util.Partial(_with_types, classifier, types[0])
    return found | {"logits": run(classifier, params, ids, mask)[:, 0]}


def _with_types(classifier: Any, types: Any, params: Any, ids: Any, mask: Any) -> Any:
    hidden = lambda params, ids, segments: classifier.hidden(params, ids, segments, types)
    return dataclasses.replace(classifier, hidden=hidden)(params, ids, mask)
