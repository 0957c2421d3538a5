"""Which tensor of a Hugging Face file is which leaf of the models of images.

ViT has two namings: since transformers 5 its modules, and so the tensors of PEFT's adapters, have
other names than the tensors in the models' files, which have kept theirs.
"""

from collections.abc import Collection, Iterator, Mapping

from lora_jax.files.naming import Entry, Naming
from lora_jax.models.weights.linear_entries import LAYERS, linear_entries, norm_entries

_PEFT = "base_model.model."


def _conv(torch: str, path: str) -> Iterator[Entry]:
    yield Entry(f"{torch}.weight", f"{path}/kernel", "conv")
    yield Entry(f"{torch}.bias", f"{path}/bias")


def _layers(
    torch: str, path: str, linear: Mapping[str, str], norms: Mapping[str, str]
) -> Iterator[Entry]:
    """Yield the entries of all layers: {module here: module in PyTorch}."""
    for place, stacked in LAYERS.items():
        for ours, theirs in linear.items():
            yield from linear_entries(f"{torch}.{theirs}", f"{path}{place}/{ours}", stacked)
        for ours, theirs in norms.items():
            yield from norm_entries(f"{torch}.{theirs}", f"{path}{place}/{ours}", stacked)


_VIT_NORMS = {"attention_norm": "layernorm_before", "mlp_norm": "layernorm_after"}
_VIT_IN_FILES = {
    **{f"attention/{x}": f"attention.attention.{x}" for x in ("query", "key", "value")},
    "attention/output": "attention.output.dense",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
}
_PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
_VIT_MODULES = {
    **{f"attention/{x}": f"attention.{y}" for x, y in _PROJECTIONS.items()},
    **{"attention/output": "attention.o_proj", "mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2"},
}


_ONE_TOKEN = "one two d -> (one two d)"


def _vit(prefix: str, layers: str, linear: Mapping[str, str]) -> Naming:
    ones = {"one": 1, "two": 1}
    rows = Naming(
        (
            *(
                Entry(f"embeddings.{x}_token", f"embeddings/{y}", "", _ONE_TOKEN, ones)
                for x, y in {"cls": "class", "distillation": "distillation"}.items()
            ),
            Entry(
                "embeddings.position_embeddings",
                "embeddings/position",
                "",
                "one n d -> (one n) d",
                {"one": 1},
            ),
            *_conv("embeddings.patch_embeddings.projection", "embeddings/patch"),
            *_layers(layers, "", linear, _VIT_NORMS),
            *norm_entries("layernorm", "norm"),
            *linear_entries("pooler.dense", "pooler"),
        )
    ).with_prefix(prefix)
    heads = ("classifier", "cls_classifier", "distillation_classifier")
    return Naming((*rows.entries, *(row for x in heads for row in linear_entries(x, x))))


def vit_in_files(stem: str, names: Collection[str] = ()) -> Naming:
    """Return the names in the file of a ViT or DeiT.

    Args:
      stem: what they begin with where the model has a head, such as "vit.".
      names: those of a file, if there is one.
    """
    return _vit(_prefix(names, stem), "encoder.layer.{n}", _VIT_IN_FILES)


def vit(stem: str, names: Collection[str] = ()) -> Naming:
    """Return the names of the modules of a ViT or DeiT.

    Args:
      stem: as in `vit_in_files`.
      names: the tensor names in a file, of a model or of an adapter: an adapter that transformers 4
        wrote has the names in the models' files.
    """
    if any(x.startswith(_PEFT) and ".encoder.layer." in x for x in names):
        return vit_in_files(stem, names)
    return _vit(_prefix(names, stem), "layers.{n}", _VIT_MODULES)


def _prefix(names: Collection[str], prefix: str) -> str:
    return prefix if any(x.removeprefix(_PEFT).startswith(prefix) for x in names) else ""


_TOWER = {
    **{f"attention/{x}": f"self_attn.{y}" for x, y in _PROJECTIONS.items()},
    **{"attention/output": "self_attn.out_proj", "mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2"},
}
_TOWER_NORMS = {"attention_norm": "layer_norm1", "mlp_norm": "layer_norm2"}


def _siglip_vision(path: str = "") -> Iterator[Entry]:
    yield from _conv("embeddings.patch_embedding", f"{path}embeddings/patch")
    yield Entry("embeddings.position_embedding.weight", f"{path}embeddings/position")
    yield from _layers("encoder.layers.{n}", path, _TOWER, _TOWER_NORMS)
    yield from norm_entries("post_layernorm", f"{path}norm")
    yield Entry("head.probe", f"{path}pool/probe")
    parts = {"parts": 3}
    for torch, leaf, axes in (
        ("weight", "kernel", "(parts o) i -> i parts o"),
        ("bias", "bias", "(parts o) -> parts o"),
    ):
        yield Entry(f"head.attention.in_proj_{torch}", f"{path}pool/qkv/{leaf}", "", axes, parts)
    yield from linear_entries("head.attention.out_proj", f"{path}pool/output")
    yield from norm_entries("head.layernorm", f"{path}pool/norm")
    for ours, theirs in {"up": "fc1", "down": "fc2"}.items():
        yield from linear_entries(f"head.mlp.{theirs}", f"{path}pool/mlp/{ours}")


def _text() -> Iterator[Entry]:
    yield Entry("embeddings.token_embedding.weight", "text/token/embedding", "embedding")
    yield Entry("embeddings.position_embedding.weight", "text/position")
    yield from _layers("encoder.layers.{n}", "text/", _TOWER, _TOWER_NORMS)
    yield from norm_entries("final_layer_norm", "text/norm")


_VISION, _TEXT = "vision_model.", "text_model."


def siglip_vision(names: Collection[str] = ()) -> Naming:
    """Return the names of SigLIP's encoder of images; transformers 4 wrote them with a prefix."""
    return Naming(tuple(_siglip_vision())).with_prefix(_prefix(names, _VISION))


def siglip(names: Collection[str] = ()) -> Naming:
    """Return the names of both of SigLIP's encoders."""
    vision = Naming(tuple(_siglip_vision("vision/"))).with_prefix(_VISION)
    rows = (*_text(), *linear_entries("head", "text/head"))
    text = Naming(rows).with_prefix(_TEXT)
    own = (Entry(x, x) for x in ("logit_scale", "logit_bias"))
    return Naming((*vision.entries, *text.entries, *own))


def _clip_vision(path: str = "") -> Iterator[Entry]:
    yield Entry("embeddings.class_embedding", f"{path}embeddings/class")
    yield Entry("embeddings.position_embedding.weight", f"{path}embeddings/position")
    yield from _conv("embeddings.patch_embedding", f"{path}embeddings/patch")
    yield from norm_entries("pre_layrnorm", f"{path}first_norm")
    yield from _layers("encoder.layers.{n}", path, _TOWER, _TOWER_NORMS)
    yield from norm_entries("post_layernorm", f"{path}norm")


def clip_vision(names: Collection[str] = ()) -> Naming:
    """Return the names of CLIP's encoder of images; transformers 4 wrote them with a prefix."""
    rows = Naming(tuple(_clip_vision())).with_prefix(_prefix(names, _VISION))
    return Naming((*rows.entries, *linear_entries("visual_projection", "projection")))


def clip(names: Collection[str] = ()) -> Naming:
    """Return the names of both of CLIP's encoders."""
    vision = Naming(tuple(_clip_vision("vision/"))).with_prefix(_VISION)
    text = Naming(tuple(_text())).with_prefix(_TEXT)
    projections = {"visual": "vision/projection", "text": "text/head"}
    heads = [x for name, y in projections.items() for x in linear_entries(f"{name}_projection", y)]
    return Naming((*vision.entries, *text.entries, *heads, Entry("logit_scale", "logit_scale")))
