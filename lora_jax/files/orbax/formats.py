"""The formats of checkpoints that are known: openpi, gemma, qwix and tunix, MaxText."""

from collections.abc import Iterator

from lora_jax.core.errors import ConfigError
from lora_jax.core.foreign import shown_value
from lora_jax.files.naming import Entry
from lora_jax.files.orbax.rows import Format, Row


def _openpi_rows(expert: str) -> Iterator[Row]:
    """Yield the rows of one expert; the second one's names end in `_1`.

    openpi/models/lora.py: an einsum's factors replace one letter each of its equation by the rank.
    So q, k and v have one A for each head, and the output's B is summed over the heads.
    The feed-forward layers leave out the scale.
    """
    for name, axes, outs, factors in (
        ("q_einsum", "l n d h", "n h", ("l n d r", "l n r h")),
        ("kv_einsum", "l c k d h", "c k h", ("l c k d r", "l c k r h")),
        ("qkv_einsum", "l c k d h", "c k h", ("l c k d r", "l c k r h")),
        ("attn_vec_einsum", "l n h d", "d", ("l n h r", "l m r d")),
    ):
        path = f"{{*m}}/{name}{expert}"
        paths = f"{path}/w", f"{path}/lora_a", f"{path}/lora_b"
        yield Row(*paths, axes, outs, factors, group=f"attn{expert}")
    for name, axes, outs, factors in (
        ("gating_einsum", "l c d f", "c f", ("l c d r", "l c r f")),
        ("linear", "l f d", "d", ("l f r", "l r d")),
    ):
        path = f"{{*m}}/mlp{expert}/{name}"
        paths = path, f"{path}_lora_a", f"{path}_lora_b"
        yield Row(*paths, axes, outs, factors, scaled=False, group=f"ffn{expert}")


def _linear(torch: str | tuple[str, ...], path: str, axes: str, **sizes: int) -> Entry:
    """Return the row of a naming for linear layers; `torch` names their modules."""
    modules = (torch,) if isinstance(torch, str) else torch
    weights = tuple(f"{module}.weight" for module in modules)
    return Entry(weights if len(weights) > 1 else weights[0], path, "linear", axes, sizes)


def _gemma_names(
    layer: str, attention: str, mlp: str, expert: str = "", stack: str = ""
) -> Iterator[Entry]:
    """Yield the names of Gemma's weights, as einsums have them.

    Args:
      layer: Hugging Face's name of a layer.
      attention, mlp: the paths of the two parts of a layer.
      expert: the end of the names of modules.
      stack: "l " where layers are stacked along the first axis.
    """
    module = lambda name: f"{layer}.self_attn.{name}_proj"
    heads = f"(c k h) d -> {stack}c k d h"
    yield _linear(module("q"), f"{attention}/q_einsum{expert}/w", f"(n h) d -> {stack}n d h")
    yield _linear((module("k"), module("v")), f"{attention}/kv_einsum{expert}/w", heads)
    yield _linear(
        (module("q"), module("k"), module("v")), f"{attention}/qkv_einsum{expert}/w", heads
    )
    yield _linear(module("o"), f"{attention}/attn_vec_einsum{expert}/w", f"d (n h) -> {stack}n h d")
    gate_up = (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")
    yield _linear(gate_up, f"{mlp}/gating_einsum", f"(c f) d -> {stack}c d f")
    yield _linear(gate_up, f"{mlp}/gating_einsum", f"(c f) d -> {stack}c f d")
    yield _linear(f"{layer}.mlp.down_proj", f"{mlp}/linear", f"d f -> {stack}f d")


def _openpi_names() -> Iterator[Entry]:
    """Yield the names of openpi's PyTorch models: PaliGemma, and the action expert."""
    whole, llm = "paligemma_with_expert", "PaliGemma/llm/layers"
    for expert, model in ("", "paligemma.model.language_model"), ("_1", "gemma_expert.model"):
        layer = f"{whole}.{model}.layers.{{l}}"
        yield from _gemma_names(layer, f"{llm}/attn", f"{llm}/mlp{expert}", expert, "l ")


_EINSUMS = {
    "q_einsum": ("n d h", "n h"),
    "kv_einsum": ("c k d h", "c k h"),
    "qkv_einsum": ("c k d h", "c k h"),
    "attn_vec_einsum": ("n h d", "d"),
}


def _gemma_rows() -> Iterator[Row]:
    """Yield the rows of gemma's `gm.nn.LoRA`: gemma/gm/nn/_lora.py and gemma/peft/_lora.py."""
    for name, (axes, outs) in (_EINSUMS | {"mm_input_projection": ("m d", "d")}).items():
        path = f"{{*m}}/{name}"
        own = f"{path}/_LoRAEinsum_0/lora"
        yield Row(f"{path}/w", f"{own}/a", f"{own}/b", axes, outs)
    for name, axes, outs in (
        ("gating_einsum", "c d f", "c f"),
        ("gating_einsum", "c f d", "c f"),
        ("linear", "f d", "d"),
    ):
        own = f"{{*m}}/_LoRAEinsum_{name}/lora"
        yield Row(f"{{*m}}/{name}", f"{own}/a", f"{own}/b", axes, outs)
    for axes, outs in (("i o", "o"), ("i n h", "n h"), ("n h o", "o")):  # of the vision encoder
        yield Row("{*m}/kernel", "{*m}/lora/a", "{*m}/lora/b", axes, outs)


def _qwix_rows() -> Iterator[Row]:
    """Yield the rows of qwix's `LoraProvider`, for the modules of tunix's models.

    qwix/_src/providers/lora.py: beside a weight `w` are `w_lora_a` and `w_lora_b`. An einsum's keep
    the axes of the weight, those of other products join several inputs or outputs.
    """
    heads = dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("d n h", "n h"))
    for name, (axes, outs) in (_EINSUMS | heads | {"o_proj": ("n h d", "d")}).items():
        path = f"{{*m}}/{name}/w"
        yield Row(path, f"{path}_lora_a", f"{path}_lora_b", axes, outs, flat=True)
    path = "{*m}/kernel"
    yield Row(path, f"{path}_lora_a", f"{path}_lora_b", "i o", "o")


def _tunix_names() -> Iterator[Entry]:
    """Yield the names of tunix's Gemma, Llama and Qwen models."""
    layer, path = "model.layers.{i}", "layers/{i}"
    yield from _gemma_names(layer, f"{path}/attn", f"{path}/mlp")
    for name in "qkv":
        yield _linear(
            f"{layer}.self_attn.{name}_proj", f"{path}/attn/{name}_proj/w", "(n h) d -> d n h"
        )
    yield _linear(f"{layer}.self_attn.o_proj", f"{path}/attn/o_proj/w", "d (n h) -> n h d")
    for name in ("gate_proj", "up_proj", "down_proj"):
        yield _linear(f"{layer}.mlp.{name}", f"{path}/mlp/{name}/kernel", "o i -> i o")


#: MaxText's modules by Hugging Face's, with their axes and outputs.
_MAXTEXT = {
    "self_attn.q_proj": ("self_attention/query", "d n h", "n h"),
    "self_attn.k_proj": ("self_attention/key", "d n h", "n h"),
    "self_attn.v_proj": ("self_attention/value", "d n h", "n h"),
    "self_attn.o_proj": ("self_attention/out", "n h d", "d"),
    "mlp.gate_proj": ("mlp/wi_0", "d f", "f"),
    "mlp.up_proj": ("mlp/wi_1", "d f", "f"),
    "mlp.down_proj": ("mlp/wo", "f d", "d"),
}


def _stacked(axes: str) -> Iterator[str]:
    """Yield the axes of a weight by itself, and in a stack of layers: axis 1, or 0."""
    first, rest = axes.split(maxsplit=1)
    yield from (axes, f"{first} l {rest}", f"l {axes}")


def _maxtext_rows() -> Iterator[Row]:
    """Yield the rows of MaxText: of qwix, and the older ones (utils/lora_utils.py)."""
    for module, axes, outs in _MAXTEXT.values():
        path = f"{{*m}}/{module.rpartition('/')[2]}"
        for own in _stacked(axes):
            weight = f"{path}/kernel"
            yield Row(weight, f"{weight}_lora_a", f"{weight}_lora_b", own, outs, flat=True)
            yield Row(weight, f"{path}/lora_a.kernel", f"{path}/lora_b.kernel", own, outs)


def _maxtext_names(rotated: tuple[str, ...] = ()) -> Iterator[Entry]:
    """Yield Hugging Face's names of MaxText's layers.

    Args:
      rotated: the ends of the modules whose rotations pair neighbours, where Hugging Face's pair
        the halves of a head: those of Llama.
    """
    for module, (ours, axes, _) in _MAXTEXT.items():
        torch = {"d n h": "(n h) d", "n h d": "d (n h)", "d f": "f d", "f d": "d f"}[axes]
        is_rotated = module.endswith(rotated) if rotated else False
        torch = "(n two half) d" if is_rotated else torch
        for own in _stacked(axes):
            axes_ = own.replace(" h", " (half two)") if is_rotated else own
            sizes = {"two": 2} if is_rotated else {}
            stacked = "l" in own.split()
            for layers in ("layers",) if stacked else ("layers_{l}", "layers/{l}"):
                path = f"decoder/{layers}/{ours}/kernel"
                yield _linear(f"model.layers.{{l}}.{module}", path, f"{torch} -> {axes_}", **sizes)


FORMATS: dict[str, Format] = {
    "openpi": Format(
        "openpi's",
        (*_openpi_rows(""), *_openpi_rows("_1")),
        tuple(_openpi_names()),
        scale="alpha = rank",
        wrapper="params",
    ),
    "gemma": Format(
        "gemma's gm.nn.LoRA",
        tuple(_gemma_rows()),
        tuple(_gemma_names("model.layers.{i}", "layer_{i}/attn", "layer_{i}/mlp")),
        scale="none",
    ),
    "tunix": Format("tunix's", tuple(_qwix_rows()), tuple(_tunix_names())),
    "maxtext": Format(
        "MaxText's",
        tuple(_maxtext_rows()),
        tuple(_maxtext_names(("q_proj", "k_proj"))),
        grown_queries=("query/kernel",),
        not_of=("query_norm/scale", "query/bias"),
        instead="maxtext_qwen",
    ),
    "maxtext_qwen": Format("MaxText's Qwen", tuple(_maxtext_rows()), tuple(_maxtext_names())),
}


def format_of(name: str) -> Format:
    """Return a format by its name.

    Raises:
      ConfigError: it is unknown.
    """
    if name not in FORMATS:
        raise ConfigError(
            f"{shown_value(name)} is not a format of checkpoints, only {', '.join(FORMATS)}"
        )
    return FORMATS[name]
