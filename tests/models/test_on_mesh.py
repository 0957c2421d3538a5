"""Models on meshes: the loss and the gradient of one device, and the collectives of a plain one."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax as lora
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.module import Decoder
from lora_jax.models.encoder.bert import Bert, BertConfig, mean_pool
from lora_jax.models.encoder.modernbert import GLOBAL, LOCAL, ModernBert, ModernBertConfig
from lora_jax.models.speech.config import WhisperConfig
from lora_jax.models.speech.whisper import Whisper
from lora_jax.models.vision.config import VisionConfig
from lora_jax.models.vision.transformer import VisionTransformer
from lora_jax.models.weights.sharding_rules import shardings
from lora_jax.training.chunked_loss import (
    language_sums_of_frozen_head,
    language_sums_of_trained_head,
)
from tests.models.recorded import load
from tests.programs import normal

CONFIG = DecoderConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
ENCODER = BertConfig(32, 16, 1, 4, 32, max_position_embeddings=64)
MESHES = {
    "tp": {"tensor": 2},
    "fsdp": {"fsdp": 4},
    "fsdp_tp": {"fsdp": 2, "tensor": 2},
    "data_fsdp_tp": {"data": 2, "fsdp": 2, "tensor": 2},
}
COLLECTIVE = re.compile(r"(all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(")
TARGETS = ["query/kernel", "value/kernel", "up/kernel", "down/kernel"]


def random(shapes):
    leaves, treedef = jax.tree.flatten(shapes)
    drawn = [normal(i, x.shape, x.dtype, 0.3) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(treedef, drawn)


def batch():
    ids = np.random.default_rng(0).integers(0, 32, (8, 17)).astype(np.int32)
    segments = np.where(np.arange(17) < 9, 1, 2)[None] * np.ones((8, 1), np.int32)
    return {"ids": ids, "segments": segments, "weights": np.ones((8, 17), np.float32)}


@dataclasses.dataclass(frozen=True)
class Model:
    """A model's parameters, the loss of a batch, and what is adapted."""

    params: dict
    loss: object
    apply: object
    config: object
    targets: tuple


def llama(*, scan=False, tied=False, trained_head=False, layers=2):
    config = dataclasses.replace(
        CONFIG, scan=scan, tie_word_embeddings=tied, remat=scan, num_hidden_layers=layers
    )
    module = Decoder(config)
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    params = random(jax.eval_shape(module.init, jax.random.key(0), ids)["params"])
    run = lambda params, *args, **options: module.apply({"params": params}, *args, **options)
    hidden = functools.partial(run, method="hidden")
    if trained_head:
        sums = language_sums_of_trained_head(hidden, functools.partial(run, method="logits"), 16)
    else:
        head = lambda p: p["embedding"]["embedding"].T if tied else p["head"]["kernel"]
        sums = language_sums_of_frozen_head(hidden, head, 16)
    own = ("embedding/embedding" if tied else "head/kernel",) if trained_head else ()
    loss = lambda params, batch: sums(params, batch)["loss"]
    apply = lambda params, batch: run(params, batch["ids"][:, :-1])
    return Model(params, loss, apply, config, (*TARGETS, *own))


def encoder(module, *targets):
    given = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    params = random(jax.eval_shape(module.init, jax.random.key(0), given, given)["params"])

    def apply(params, batch):
        states = module.apply({"params": params}, batch["ids"], batch["segments"])
        return mean_pool(states, batch["segments"], 2)

    loss = lambda params, batch: jnp.sin(apply(params, batch)).sum()
    return Model(params, loss, apply, module.config, targets)


def bert(**layers):
    targets = ("query/kernel", "intermediate/kernel", "attention/output/kernel")
    return encoder(Bert(dataclasses.replace(ENCODER, **layers)), *targets)


def modernbert(kinds=(LOCAL,), **layers):
    config = ModernBertConfig(32, 16, 24, len(kinds), 2, kinds, local_attention=6, **layers)
    return encoder(ModernBert(config), "qkv/kernel", "input/kernel", "mlp/output/kernel")


def vit(count=1, **layers):
    config = VisionConfig(16, 32, count, 4, image_size=8, patch_size=4, num_labels=4, **layers)
    module, pixels = VisionTransformer(config), jax.ShapeDtypeStruct((1, 8, 8, 3), "float32")
    params = random(jax.eval_shape(module.init, jax.random.key(0), pixels)["params"])

    def apply(params, batch):
        """Take images from the ids of the tests' batch: 8 rows of 17."""
        rows = batch["ids"][:, :8, None, None]
        pixels = jnp.sin(rows * jnp.arange(1.0, 25).reshape(1, 1, 8, 3))
        return module.apply({"params": params}, pixels)

    loss = lambda params, batch: jnp.sin(apply(params, batch)).sum()
    return Model(params, loss, apply, config, ("query/kernel", "up/kernel", "patch/kernel"))


def whisper(count=1, **options):
    sizes = {"num_mel_bins": 4, "d_model": 16, "max_source_positions": 6, **options}
    layers = {f"{x}_layers": count for x in ("encoder", "decoder")}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 4}
    inner = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    config = WhisperConfig(vocab_size=32, **sizes, **layers, **heads, **inner)
    module, ids = Whisper(config), jax.ShapeDtypeStruct((1, 4), jnp.int32)
    given = {"ids": ids, "features": jax.ShapeDtypeStruct((1, 12, 4), "float32")}
    params = random(jax.eval_shape(module.init, jax.random.key(0), **given)["params"])

    def apply(params, batch):
        rows = batch["ids"][:, :12, None]
        features = jnp.sin(rows * jnp.arange(1.0, 5)[None, None])
        return module.apply({"params": params}, batch["ids"], features=features)

    loss = lambda params, batch: jnp.sin(apply(params, batch)).sum()
    return Model(params, loss, apply, config, ("query/kernel", "cross/output/kernel", "up/kernel"))


def recorded(name, scan=True):
    """Return a family of transformers with switches of its own; windows differ within a scan."""
    found = load(name, scan=scan, remat=scan)
    run = lambda params, *args, **options: found.module.apply({"params": params}, *args, **options)
    tied = found.config.tie_word_embeddings
    head = lambda p: p["embedding"]["embedding"].T if tied else p["head"]["kernel"]
    hidden = functools.partial(run, method="hidden")
    sums = language_sums_of_frozen_head(hidden, head, 16, found.module.finish)
    loss = lambda params, batch: sums(params, batch)["loss"]
    apply = lambda params, batch: run(params, batch["ids"][:, :-1])
    fused = ("query_key_value/kernel", "gate_up/kernel", "down/kernel")
    targets = fused if found.config.fused else tuple(TARGETS)
    return Model(found.params, loss, apply, found.config, targets)


def adapt(model, params, batch):
    config = lora.LoraConfig(rank=2, targets=list(model.targets))
    return lora.split(lora.init(jax.random.key(1), params, config, model.apply, batch))


def gradient(model):
    def of(adapters, base, batch):
        return lora.lora(model.loss, on_dense="error")(lora.join(base, adapters), batch)

    return jax.value_and_grad(of)


def mesh_of(name, kind):
    sizes = MESHES[name]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), (kind,) * len(sizes))


def place(model, mesh):
    """Return parameters and a batch on a mesh."""
    rows = tuple(name for name in mesh.axis_names if name != "tensor")
    where = NamedSharding(mesh, PartitionSpec(rows or None))
    params = jax.device_put(model.params, shardings(model.params, mesh, config=model.config))
    return params, jax.device_put(batch(), where)


def on_mesh(model, name, kind):
    """Return the loss and the gradient on one device, and on the mesh."""
    base, zero = adapt(model, model.params, batch())
    adapters = random(zero)
    alone = jax.jit(gradient(model))(adapters, base, batch())
    mesh = mesh_of(name, kind)
    with jax.set_mesh(mesh):
        params, rows = place(model, mesh)
        base, zero = adapt(model, params, rows)
        adapters = jax.tree.map(lambda x, z: jax.device_put(x, z.sharding), adapters, zero)
        return alone, jax.jit(gradient(model))(adapters, base, rows)


def close(alone, other):
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-5, atol=2e-5)


STACKED = {"scan": True, "remat": "full"}
MODELS = {
    "unrolled": llama,
    "scan": functools.partial(llama, scan=True, tied=True),
    "trained_head": functools.partial(llama, tied=True, trained_head=True, layers=1),
    "bert": bert,
    **{name: functools.partial(recorded, name) for name in ("gemma2", "gemma3_text", "olmo2")},
    "phi3": functools.partial(recorded, "phi3", scan=False),
    "modernbert": modernbert,
    "vit": vit,
    "whisper": whisper,
    "bert_scan": functools.partial(bert, num_hidden_layers=2, **STACKED),
    "modernbert_scan": functools.partial(modernbert, (GLOBAL, LOCAL, GLOBAL), **STACKED),
    "vit_scan": functools.partial(vit, 2, **STACKED),
    "whisper_scan": functools.partial(whisper, 2, **STACKED),
}
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
DEFAULT = {
    ("trained_head", "fsdp_tp", "explicit"),
}
CASES = [
    pytest.param(*case, marks=() if case in DEFAULT else pytest.mark.slow, id="-".join(case))
    for case in ((m, n, k) for m in MODELS for n in MESHES for k in KINDS)
]


@pytest.mark.parametrize(("model", "name", "kind"), CASES)
def test_equals_one_device(model, name, kind, quick_compile):
    close(*on_mesh(MODELS[model](), name, KINDS[kind]))


@pytest.mark.parametrize("auto", [(), pytest.param(("tensor",), marks=pytest.mark.slow)])
def test_inside_a_shard_map(auto, quick_compile):
    """Rows are cut by hand; what is left to the compiler is sharded along other axes."""
    model = llama(scan=bool(auto), tied=True, layers=1)
    base, zero = adapt(model, model.params, batch())
    adapters = random(zero)
    alone = jax.jit(gradient(model))(adapters, base, batch())
    axes = ("data", *auto)
    mesh = jax.make_mesh((2,) * len(axes), axes, (AxisType.Auto,) * len(axes))

    def of(adapters, base, batch):
        one = lora.lora(model.loss, on_dense="error")
        return jax.lax.psum(one(lora.join(base, adapters), batch), "data")

    specs = (PartitionSpec(), PartitionSpec(), PartitionSpec("data"))
    with jax.set_mesh(mesh):
        base = jax.device_put(base, shardings(base, mesh, config=model.config))
        manual = jax.shard_map(of, in_specs=specs, out_specs=PartitionSpec(), axis_names={"data"})
        close(alone, jax.jit(jax.value_and_grad(manual))(adapters, base, batch()))


@pytest.mark.parametrize(
    "kind", [pytest.param("auto"), pytest.param("explicit", marks=pytest.mark.slow)]
)
def test_a_plain_model_gathers_each_weight_once_and_sums_each_block(kind, optimized):
    """Counted by hand: seven weights, the head, the embedding and what was looked up in it; a sum
    for each of the two blocks, and for the softmax over a sharded vocabulary its maximum, its sum
    with the targets' logits, and the loss.
    """
    model = llama(layers=1)
    mesh = mesh_of("fsdp_tp", KINDS[kind])
    with jax.set_mesh(mesh):
        compiled = jax.jit(model.loss).lower(*place(model, mesh)).compile()
    found = collections.Counter(COLLECTIVE.findall(compiled.as_text()))
    assert found == {"all-gather": 10, "all-reduce": 5}
