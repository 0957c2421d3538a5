"""Record what the modules of other JAX trainers compute with their LoRA factors.

    PYTHONPATH=SITE:OPENPI:. python -m tests.parity.checkpoints.record_trainers

SITE has gemma 3.3.0, google-tunix 0.1.7, qwix 0.1.8 and what they import in the end; requirements
that these tiny models do not use are stubbed. OPENPI has openpi/models/{lora,gemma}.py of
github.com/Physical-Intelligence/openpi at 15a9616a. MAXTEXT names
src/maxtext/checkpoint_conversion/to_huggingface.py of github.com/AI-Hypercomputer/maxtext at
e591f30c. Writes `trainers.npz`:

    <case>/tree/<path>    the random factors
    <case>/delta/<path>   what the trainer's own module adds to this weight: its result for each
                          unit vector, with a weight of zeros

all in one array `values`, and their shapes by name in `index`. And it checks what no file can:
each model computes the same with the weights that lora_jax merged.
"""

import ast
import importlib.abc
import importlib.machinery
import json
import os
import pathlib
import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax import traverse_util as paths

import lora_jax
from lora_jax import orbax

OUT = pathlib.Path(__file__).parent / "trainers.npz"
STUBBED = (
    *("clu", "ml_collections", "immutabledict", "grain", "sentencepiece", "tensorflow", "PIL"),
    *("tensorflow_datasets", "pandas", "IPython", "tqdm", "metrax", "wandb", "transformers"),
    *("datasets", "kagglehub", "huggingface_hub", "omegaconf", "torch", "tensorboardX", "google"),
    *("perfetto", "sglang", "sgl_jax", "vllm", "tenacity", "pathwaysutils"),
    *("dialog", "hackable_diffusion", "mediapy", "sklearn", "xmanager", "fiddle", "treescope"),
)


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports packages that are absent as modules whose names are all mocks."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in STUBBED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__ = []

        def get(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return mock.MagicMock(name=f"{spec.name}.{name}")

        module.__getattr__ = get
        return module

    def exec_module(self, module):
        pass


FOUND = {}


def flat(tree):
    return {"/".join(map(str, k)): np.asarray(x) for k, x in paths.flatten_dict(tree).items()}


def randomized(tree, seed=0):
    """Return a tree of the same shapes with random numbers, norms and factors among them."""
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32)
    return jax.tree.unflatten(treedef, [draw(x) for x in leaves])


def keep(case, tree, deltas):
    FOUND.update({f"{case}/tree/{p}": x for p, x in flat(tree).items() if "lora" in p.lower()})
    FOUND.update({f"{case}/delta/{path}": np.asarray(x) for path, x in deltas.items()})


def tell(case, adapted, merged):
    print(f"{case}: largest difference {abs(np.asarray(adapted) - np.asarray(merged)).max():.2e}")


def gemma(case, **config):
    from gemma import peft
    from gemma.gm.nn import _config, _lora, _modules, _transformer

    sizes = {"num_embed": 32, "embed_dim": 10, "hidden_dim": 14, "num_heads": 2, "head_dim": 4}
    model = _transformer.Transformer(
        config=_config.TransformerConfig(
            **sizes,
            final_logit_softcap=None,
            use_post_attn_norm=True,
            use_post_ffw_norm=True,
            attention_types=(_modules.AttentionType.GLOBAL,),
            **config,
        ),
        dtype=jnp.float32,
    )
    adapted, ids = _lora.LoRA(rank=3, model=model, dtype=jnp.float32), jnp.arange(5)[None]
    params = randomized(adapted.init(jax.random.key(0), ids)["params"])
    gating = "...F,NHF->...NH" if config.get("transpose_gating_einsum") else "...F,NFH->...NH"
    equations = {"q_einsum/w": "BTD,NDH->BTNH", "kv_einsum/w": "BSD,CKDH->CBSKH"}
    equations |= {"qkv_einsum/w": "BTD,SNDH->SBTNH", "attn_vec_einsum/w": "BTNH,NHD->BTD"}
    equations |= {"mlp/gating_einsum": gating, "mlp/linear": "...H,HF->...F"}
    deltas = {}
    for path, a in flat(params).items():
        if not path.endswith("lora/a"):
            continue
        module = path.removesuffix("/lora/a")
        parent, _, own = module.rpartition("/")
        weight = f"{parent}/w" if own == "_LoRAEinsum_0" else f"{parent}/{own.split('_', 2)[2]}"
        w = flat(params)[weight]
        equation = next(e for end, e in equations.items() if weight.endswith(end))
        factors = {"a": a, "b": flat(params)[f"{module}/lora/b"]}
        adapter = peft.LoRAEinsumAdapter(rank=3, einsum_str=equation, shape=w.shape)
        ins = a.shape[:-1]
        eye = np.eye(int(np.prod(ins)), dtype="f4").reshape(1, -1, *ins)
        y = np.asarray(adapter.apply({"params": factors}, eye))
        deltas[weight] = unit_results(equation, y, w.shape, ins)
    keep(case, params, deltas)
    joined = orbax.from_tree(params, "gemma")
    run = lambda m, p: m.apply({"params": p}, ids).logits
    tell(case, run(adapted, params), run(model, lora_jax.merge(joined)))
    back = orbax.to_tree(joined, "gemma")
    tell(f"{case}, written back", run(adapted, params), run(adapted, back))


def unit_results(equation, y, shape, ins):
    """Turn the results for unit vectors of the inputs into a weight."""
    left, out = equation.split("->")
    x, w = left.split(",")
    lead = "ab" if x.startswith("...") else ""
    x, out = x.replace("...", lead), out.replace("...", lead)
    batch, position = x[0], x[1]
    letters = [c for c in w if c in x]
    y = np.moveaxis(y, [out.index(batch), out.index(position)], [0, 1])[0]
    rest = [c for c in out if c not in (batch, position)]
    y = y.reshape(*ins, *y.shape[1:])
    return np.transpose(y, [[*letters, *rest].index(c) for c in w]).reshape(shape)


def tunix(case, module, **sizes):
    import qwix
    from tunix.models.gemma3 import model as gemma3
    from tunix.models.llama3 import model as llama3

    of = {"gemma3": (gemma3, gemma3.Gemma3), "llama3": (llama3, llama3.Llama3)}[module]
    config = of[0].ModelConfig(num_layers=1, embed_dim=10, hidden_dim=14, **sizes)
    plain = of[1](config, rngs=nnx.Rngs(0))
    rule = qwix.LoraProvider(
        module_path=".*(q_einsum|kv_einsum|attn_vec_einsum|proj)", rank=3, alpha=4.5
    )
    adapted = qwix.apply_lora_to_model(plain, rule, rngs=nnx.Rngs(0), **plain.get_model_input())
    state = nnx.state(adapted, (nnx.Param, nnx.LoRAParam))
    nnx.update(adapted, randomized(state))
    pure = nnx.to_pure_dict(nnx.state(adapted, (nnx.Param, nnx.LoRAParam)))
    inputs = {
        "positions": jnp.arange(4)[None],
        "cache": None,
        "attention_mask": jnp.tril(jnp.ones((1, 4, 4), bool)),
    }
    first = "last_tokens" if module == "gemma3" else "input_tokens"
    run = lambda m: m(**{first: jnp.arange(4)[None]}, **inputs)[0]
    wanted, deltas = run(adapted), {}
    leaves = flat(pure)
    for path, w in leaves.items():
        if f"{path}_lora_a" not in leaves:
            continue
        owner = plain
        for name in path.split("/")[:-1]:
            owner = owner[int(name)] if name.isdecimal() else getattr(owner, name)
        name = path.rpartition("/")[2]
        equation = getattr(owner, "einsum_str", "BTI,IO->BTO")
        left, right = equation.split("->")[0].split(",")
        ins = tuple(n for c, n in zip(right, w.shape, strict=True) if c in left)
        eye = jnp.eye(int(np.prod(ins))).reshape(1, -1, *ins)
        every = qwix.LoraProvider(module_path=".*", rank=3, alpha=4.5)
        alone = qwix.apply_lora_to_model(owner, every, eye, rngs=nnx.Rngs(0))
        getattr(alone, name).value = jnp.zeros(w.shape)
        for end in ("_lora_a", "_lora_b"):
            getattr(alone, name + end).value = jnp.asarray(leaves[path + end])
        deltas[path] = unit_results(equation, np.asarray(alone(eye)), w.shape, ins)
    keep(case, pure, deltas)
    joined = orbax.from_tree(pure, "tunix", alpha=4.5)
    merged = of[1](config, rngs=nnx.Rngs(0))
    values = nnx.state(merged, nnx.Param)
    nnx.replace_by_pure_dict(values, lora_jax.merge(joined))
    nnx.update(merged, values)
    tell(case, wanted, run(merged))
    back = orbax.to_tree(joined, "tunix", alpha=4.5)
    assert jax.tree.all(jax.tree.map(np.array_equal, flat(back), leaves))


def einsum_delta(lora, adapter, equation, leaves, path, layer):
    """Return what openpi's Einsum adds to the weight of one layer."""
    part, w = path.removesuffix("/w"), leaves[path][layer]
    ins = w.shape[:2] if "vec" in path else (w.shape[-2],)
    params = {name: leaves[f"{part}/{name}"][layer] for name in ("lora_a", "lora_b")}
    eye = np.eye(int(np.prod(ins)), dtype="f4").reshape(1, -1, *ins)
    module = lora.Einsum(shape=w.shape, lora_config=adapter)
    y = module.apply({"params": params | {"w": 0 * w}}, equation, eye)
    return unit_results(equation, np.asarray(y), w.shape, ins)


def openpi(case, heads, groups, rslora):
    typing = types.ModuleType("openpi.shared.array_typing")
    typing.typecheck, typing.Array = lambda f: f, jax.Array
    for name in ("Float", "Int", "Bool"):
        setattr(typing, name, mock.MagicMock())
    sharding = types.ModuleType("openpi.training.sharding")
    sharding.activation_sharding_constraint = lambda x: x
    parts = {"openpi.shared": typing, "openpi.training": sharding}
    for package, module in parts.items():
        sys.modules[package] = types.ModuleType(package)
        sys.modules[module.__name__] = module
        setattr(sys.modules[package], module.__name__.rpartition(".")[2], module)
    from openpi.models import gemma as model
    from openpi.models import lora

    model.PALIGEMMA_VOCAB_SIZE = 32
    adapter = lora.LoRAConfig(rank=3, alpha=4.5, rslora=rslora)
    config = lambda width, lora: model.Config(
        width, 2, 14, heads, groups, 4, {"attn": adapter, "ffn": adapter} if lora else {}
    )
    build = lambda lora: model.Module(
        configs=(config(10, lora), config(6, lora)), embed_dtype="float32"
    )
    positions, mask = jnp.arange(6)[None], jnp.tril(jnp.ones((1, 6, 6), bool))
    rng = np.random.default_rng(1)
    xs = [jnp.asarray(rng.normal(size=(1, 3, n)), jnp.float32) for n in (10, 6)]
    args = xs, positions, mask
    start = nn.Module.init(build(True), jax.random.key(0), *args)  # it has another `init`
    params = randomized(start["params"])
    tree = {"PaliGemma": {"llm": params}}
    equations = {"q_einsum": "BTD,NDH->BTNH", "kv_einsum": "BSD,2KDH->2BSKH"}
    equations |= {"qkv_einsum": "BSD,3KDH->3BSKH", "attn_vec_einsum": "BTNH,NHD->BTD"}
    deltas, leaves = {}, flat(tree)
    for path in leaves:
        base = path.removesuffix("/w").removesuffix("_1").rpartition("/")[2]
        if base in equations:
            found = [einsum_delta(lora, adapter, equations[base], leaves, path, n) for n in (0, 1)]
            deltas[path] = np.stack(found)
    for path in [p for p in leaves if p.endswith(("gating_einsum", "linear"))]:
        w, a, b = (leaves[p] for p in (path, f"{path}_lora_a", f"{path}_lora_b"))
        eye = jnp.eye(w.shape[-2])
        every = [
            lora.FeedForward._dot(None, eye, 0 * w[i], (a[i], b[i]))
            for i in np.ndindex(*w.shape[:-2])
        ]
        deltas[path] = np.stack(every).reshape(w.shape)
    keep(case, tree, deltas)
    joined = orbax.from_tree(tree, "openpi", alpha=4.5, rslora=rslora)
    merged = lora_jax.merge(joined)["PaliGemma"]["llm"]
    run = lambda lora, p: jnp.concatenate(
        [x.reshape(-1) for x in build(lora).apply({"params": p}, *args)[0]]
    )
    tell(case, run(True, params), run(False, merged))


def maxtext(case):
    """MaxText's own function on factors as qwix stacks them, layers along axis 1 and axis 0."""
    source = pathlib.Path(os.environ["MAXTEXT"]).read_text()
    (function,) = [x for x in ast.parse(source).body if getattr(x, "name", "") == "_get_lora_delta"]
    space = {"jnp": jnp}
    exec(ast.unparse(function), space)
    shapes = {  # of W, A and B; 3 layers, width 10, 2 heads of 4, hidden 14, rank 5
        "self_attention/query/kernel": ((10, 3, 2, 4), (10, 3, 5), (5, 3, 8)),
        "self_attention/out/kernel": ((2, 3, 4, 10), (8, 3, 5), (5, 3, 10)),
        "mlp/wi_0/kernel": ((10, 3, 14), (10, 3, 5), (5, 3, 14)),
        "mlp/wo/kernel": ((14, 3, 10), (3, 14, 5), (3, 5, 10)),
    }
    rng, tree, deltas = np.random.default_rng(2), {}, {}
    for path, three in shapes.items():
        w, a, b = (rng.normal(size=shape).astype("f4") for shape in three)
        path = f"params/decoder/layers/{path}"
        tree |= {f"{path}_lora_a": a, f"{path}_lora_b": b}
        key = path.replace("/", "-")
        delta = np.asarray(
            space["_get_lora_delta"](key, {f"{key}_lora_a": a, f"{key}_lora_b": b}, 0.6)
        )
        if "wo" in path:  # its result has the layers first
            delta = np.moveaxis(delta, 0, 1)
        if "out" in path:  # [heads·size, layers, width]
            delta = delta.reshape(2, 4, 3, 10).transpose(0, 2, 1, 3)
        deltas[path.removeprefix("params/")] = delta.reshape(w.shape)
    FOUND.update({f"{case}/tree/{path}": x for path, x in tree.items()})
    FOUND.update({f"{case}/delta/{path}": x for path, x in deltas.items()})


if __name__ == "__main__":
    openpi("openpi", 2, 1, rslora=False)
    openpi("openpi rslora", 2, 2, rslora=True)
    maxtext("maxtext")
    sys.meta_path.append(Stubs())
    gemma("gemma", num_kv_heads=1, transpose_gating_einsum=True, use_qk_norm=True)
    gemma("gemma qkv", num_kv_heads=2)
    sizes = {"num_heads": 2, "head_dim": 4, "num_kv_heads": 1}
    more = {"num_embed": 32, "param_dtype": jnp.float32, "sliding_window_size": 8}
    tunix("tunix gemma3", "gemma3", **more, **sizes)
    tunix("tunix llama3", "llama3", vocab_size=32, rope_theta=10000, norm_eps=1e-6, **sizes)
    index = {name: list(x.shape) for name, x in FOUND.items()}
    values = np.concatenate([x.ravel() for x in FOUND.values()]).astype("f4")
    np.savez_compressed(OUT, index=json.dumps(index), values=values)
