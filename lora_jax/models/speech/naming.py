"""Which tensor of a Hugging Face file is which leaf of `Whisper`."""

from collections.abc import Collection, Iterator

from lora_jax.files.naming import Entry, Naming
from lora_jax.models.weights.linear_entries import LAYERS, linear_entries, norm_entries

PREFIX = "model."  # of the names in the file of a model with a head
_PEFT = "base_model.model."


_LINEAR = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}


def _layers(part: str, attentions: dict[str, str]) -> Iterator[Entry]:
    for place, stacked in LAYERS.items():
        yield from _layers_at(f"{part}/{place}", f"{part}.layers.{{n}}", attentions, stacked)


def _layers_at(path: str, torch: str, attentions: dict[str, str], stacked: bool) -> Iterator[Entry]:
    for ours, theirs in attentions.items():
        for name, module in _LINEAR.items():
            yield from linear_entries(
                f"{torch}.{theirs}.{module}", f"{path}/{ours}/{name}", stacked
            )
        yield from norm_entries(f"{torch}.{theirs}_layer_norm", f"{path}/{ours}_norm", stacked)
    for name, module in {"up": "fc1", "down": "fc2"}.items():
        yield from linear_entries(f"{torch}.{module}", f"{path}/mlp/{name}", stacked)
    yield from norm_entries(f"{torch}.final_layer_norm", f"{path}/mlp_norm", stacked)


def _conv(name: str) -> Iterator[Entry]:
    yield Entry(f"encoder.{name}.weight", f"encoder/{name}/kernel", "conv", "o i w -> w i o")
    yield Entry(f"encoder.{name}.bias", f"encoder/{name}/bias")


WHISPER = Naming(
    (
        *_conv("conv1"),
        *_conv("conv2"),
        Entry("encoder.embed_positions.weight", "encoder/position"),
        *_layers("encoder", {"attention": "self_attn"}),
        *norm_entries("encoder.layer_norm", "encoder/norm"),
        Entry("decoder.embed_tokens.weight", "decoder/embedding/embedding", "embedding"),
        Entry("decoder.embed_positions.weight", "decoder/position"),
        *_layers("decoder", {"attention": "self_attn", "cross": "encoder_attn"}),
        *norm_entries("decoder.layer_norm", "decoder/norm"),
    )
)


def naming(names: Collection[str] = ()) -> Naming:
    """Return Whisper's naming; `names` are the tensors in a file, if there is one."""
    is_bare = any(x.removeprefix(_PEFT).startswith(("encoder.", "decoder.")) for x in names)
    return WHISPER if is_bare else WHISPER.with_prefix(PREFIX)
