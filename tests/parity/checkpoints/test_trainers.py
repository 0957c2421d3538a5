"""Checkpoints of other trainers: the update of each weight is what the trainer's own module adds.

Recorded by `record_trainers.py` with gemma 3.3.0, google-tunix 0.1.7 on qwix 0.1.8, openpi's models
at 15a9616a and MaxText's `_get_lora_delta` at e591f30c.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import orbax, peft
from lora_jax.core.tree import adapted_nodes
from lora_jax.files.disk import safetensors_file
from lora_jax.files.orbax.nested import leaves_of, nest, path_of

FILE = pathlib.Path(__file__).parent / "trainers.npz"
CASES = {
    "openpi": ("openpi", {"alpha": 4.5}),
    "openpi rslora": ("openpi", {"alpha": 4.5, "rslora": True}),
    "gemma": ("gemma", {}),
    "gemma qkv": ("gemma", {}),
    "tunix gemma3": ("tunix", {"alpha": 4.5}),
    "tunix llama3": ("tunix", {"alpha": 4.5}),
    "maxtext": ("maxtext", {"alpha": 3.0}),  # of rank 5: the scale is 0.6
}


@pytest.fixture(scope="module")
def recorded():
    """{case: (factors by path, deltas by path)}."""
    with np.load(FILE) as file:
        index, values = json.loads(str(file["index"])), file["values"]
    found, at = {case: ({}, {}) for case in CASES}, 0
    for name, shape in index.items():
        case, kind, path = name.split("/", 2)
        size = int(np.prod(shape))
        found[case][kind == "delta"][path] = values[at : at + size].reshape(shape)
        at += size
    assert at == len(values)
    return found


def tree_of(factors, deltas):
    """Return a checkpoint's tree; its weights are zeros, so what is merged is the update."""
    wrap = "params/" if any(path.startswith("params/") for path in factors) else ""
    weights = {f"{wrap}{path}": np.zeros_like(x) for path, x in deltas.items()}
    every = {**weights, **factors, f"{wrap}norm/scale": np.ones(4, "f4")}
    return nest({tuple(path.split("/")): x for path, x in every.items()})


def plain(node):
    """scale·A·B of a node in float64, with the weight's axes."""
    a, b, scale = (np.asarray(x, float) for x in (node.a, node.b, node.scale))
    axes = node.layout.axes
    names = [chr(ord("a") + i) for i in range(len(axes))]
    of = lambda kinds: "".join(n for k in kinds for n, x in zip(names, axes, strict=True) if x == k)
    return np.einsum(f"{of('bi')}Z,{of('b')}Z{of('o')},{of('b')}->{''.join(names)}", a, b, scale)


@pytest.mark.parametrize("case", CASES)
def test_updates_are_the_trainers(case, recorded):
    format, options = CASES[case]
    factors, deltas = recorded[case]
    params = orbax.from_tree(tree_of(factors, deltas), format, **options)
    nodes = adapted_nodes(params)
    assert nodes.keys() == deltas.keys() and len(deltas) > 3
    for path, delta in deltas.items():
        np.testing.assert_allclose(plain(nodes[path]), delta, atol=3e-6 * max(1, abs(delta).max()))
        assert nodes[path].w.shape == delta.shape
    others = {path_of(keys) for keys, _ in leaves_of(params)} - nodes.keys()
    assert others == {"norm/scale"}


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("openpi")])
def test_what_is_written_is_what_was_read(case, recorded):
    format, options = CASES[case]
    factors, deltas = recorded[case]
    params = orbax.from_tree(tree_of(factors, deltas), format, **options)
    whole = {path_of(keys): x for keys, x in leaves_of(orbax.to_tree(params, format, **options))}
    assert {*deltas} <= whole.keys()
    alone = lora_jax.split(params)[1]
    back = orbax.to_tree(alone, format, **options)
    for more in (1, 2):  # with twice the alpha B has half of its numbers
        given = {name: more * x for name, x in options.items()}
        tree = orbax.to_tree(alone, format, **given)
        again = orbax.from_tree(tree, format, base=lora_jax.split(params)[0], **given)
        for path, node in adapted_nodes(again).items():
            atol = 3e-6 * abs(deltas[path]).max()
            np.testing.assert_allclose(plain(node), deltas[path], atol=atol)
    if case != "maxtext":  # one of two ways to stack
        own = {path_of(keys): x for keys, x in leaves_of(back)}
        assert own.keys() == factors.keys()
        for path, x in factors.items():
            np.testing.assert_array_equal(own[path], x)


@pytest.mark.parametrize("case", ["openpi", "openpi rslora"])
def test_openpis_factors_are_written_as_they_were(case, recorded, tmp_path):
    """Bit for bit, but for the output's B, of which openpi sums over the heads."""
    factors, deltas = recorded[case]
    options = CASES[case][1] | {"alpha": None}  # that of the rank: the scale is 1, if not rsLoRA's
    params = orbax.from_tree(tree_of(factors, deltas), "openpi", **options)
    orbax.save(tmp_path / "openpi", lora_jax.split(params)[1], "openpi")
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        written = checkpointer.restore(tmp_path / "openpi")
    assert written.keys() == {"params"}
    got = {path_of(keys): np.asarray(x) for keys, x in leaves_of(written)}
    want = {f"params/{path.removeprefix('params/')}": x for path, x in factors.items()}
    assert got.keys() == want.keys()
    for path, x in want.items():
        assert got[path].shape == x.shape
        if "rslora" in case and path.endswith("_b"):
            continue  # the rest of the scale is in it
        pair = (got[path], x)
        if "attn_vec_einsum" in path and path.endswith("_b"):
            pair = (got[path].sum(1), x.sum(1))
        np.testing.assert_allclose(*pair, atol=0 if pair[1] is x else 1e-6)
    again = orbax.from_tree(written, "openpi", base=lora_jax.split(params)[0])
    for path, node in adapted_nodes(params).items():
        np.testing.assert_allclose(plain(adapted_nodes(again)[path]), plain(node), atol=1e-6)


def test_an_adapter_of_another_origin_is_written_for_openpi(recorded):
    """One A for all heads: each gets it, and the ranks of a group become equal."""
    _, deltas = recorded["openpi"]
    base = lora_jax.split(orbax.from_tree(tree_of(*recorded["openpi"]), "openpi"))[0]
    rng, nodes = (
        np.random.default_rng(5),
        adapted_nodes(orbax.from_tree(tree_of(*recorded["openpi"]), "openpi")),
    )
    tree = lora_jax.core.paths.flatten_with_paths(base)[0]
    for i, (path, node) in enumerate(nodes.items()):
        draw = lambda shape: jnp.asarray(rng.normal(size=shape), "float32")
        rank, lead = 1 + i % 3, node.scale.shape
        ins = node.a.shape[len(lead) : -1]
        outs = node.b.shape[len(lead) + 1 :]
        tree[path] = lora_jax.LoraWeight(
            tree[path],
            draw((*lead, *ins, rank)),
            draw((*lead, rank, *outs)),
            jnp.full(lead, 0.7),
            layout=node.layout,
        )
    params = nest({tuple(path.split("/")): x for path, x in tree.items()})
    written = {path_of(k): x for k, x in leaves_of(orbax.to_tree(params, "openpi", alpha=6))}
    ranks = {path: x.shape[-1] for path, x in written.items() if path.endswith("lora_a")}
    attention = {rank for path, rank in ranks.items() if "/attn/" in path and "_1/" not in path}
    assert len(attention) == 1
    back = adapted_nodes(
        orbax.from_tree(
            nest({tuple(p.split("/")): x for p, x in written.items()}), "openpi", alpha=6
        )
    )
    assert back.keys() == nodes.keys() == deltas.keys()
    for path in nodes:
        np.testing.assert_allclose(plain(back[path]), plain(tree[path]), atol=1e-6)


def torch_of(format, path, delta):
    """Return {the end of a Hugging Face name: delta [out, in]}, by hand."""
    end = path.split("/")[-1] if path.endswith(("einsum", "linear")) else path.split("/")[-2]
    if format == "tunix" and path.endswith("kernel"):
        return {path.split("/")[-2]: delta.T}
    flat = lambda x: x.reshape(x.shape[0], -1) if x.ndim == 3 else x
    heads = lambda x: np.moveaxis(x, -1, -2).reshape(-1, x.shape[-2])  # [n, d, h] -> [n·h, d]
    if end == "q_einsum":
        return {"q_proj": heads(delta)}
    if end in ("kv_einsum", "qkv_einsum"):
        return {f"{x}_proj": heads(part) for x, part in zip(end[:-7], delta, strict=True)}
    if end == "attn_vec_einsum" or end == "o_proj":
        return {"o_proj": delta.reshape(-1, delta.shape[-1]).T}
    if end == "gating_einsum":
        gate, up = (x if x.shape[0] == 14 else x.T for x in delta)
        return {"gate_proj": gate, "up_proj": up}
    if end == "linear":
        return {"down_proj": delta.T}
    return {end: flat(delta.transpose(1, 2, 0)).reshape(-1, delta.shape[0])}  # [d, n, h]


@pytest.mark.parametrize("case", ["gemma", "gemma qkv", "tunix gemma3", "tunix llama3", "openpi"])
def test_as_a_peft_adapter(case, recorded, tmp_path):
    format, options = CASES[case]
    factors, deltas = recorded[case]
    params = orbax.from_tree(tree_of(factors, deltas), format, **options)
    orbax.to_peft(tmp_path / "peft", params, format)
    tensors, _ = safetensors_file.read(tmp_path / "peft" / peft.TENSORS)
    config = peft.read_config(tmp_path / "peft")
    got = {}
    for name, a in tensors.items():
        if ".lora_A" in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[name.replace("lora_A", "lora_B")].astype(float)
            got[module] = config.scale(module, a.shape[0]) * (b @ a.astype(float))
    wanted = {}
    for path, delta in deltas.items():
        expert = "gemma_expert" if "_1" in path else "paligemma"
        layers = enumerate(delta) if format == "openpi" else [(0, delta)]
        for n, one in layers:
            own = path.replace("_1", "")
            for end, x in torch_of(format, own, one).items():
                wanted[(expert if format == "openpi" else "", n, end)] = x
    assert len(got) == len(wanted)
    for module, update in got.items():
        parts = module.split(".")
        expert = next((x for x in ("gemma_expert", "paligemma") if x in parts), "")
        key = expert, int(parts[parts.index("layers") + 1]), parts[-1]
        np.testing.assert_allclose(update, wanted[key], atol=1e-5 * max(1, abs(update).max()))


def test_maxtext_queries_are_those_of_hugging_face(tmp_path):
    """MaxText's hooks of Llama 3.1: queries times √size, and rotated halves, not neighbours."""
    f = lambda *shape: np.random.default_rng(1).normal(size=shape).astype("f4")
    a, b = f(10, 3, 5), f(5, 3, 12)  # 3 layers, 2 heads of 6
    kernel = {"kernel": f(10, 3, 2, 6), "kernel_lora_a": a, "kernel_lora_b": b}
    tree = {"decoder": {"layers": {"self_attention": {"query": kernel, "key": kernel}}}}
    orbax.to_peft(tmp_path, orbax.from_tree(tree, "maxtext", alpha=5), "maxtext")
    tensors, _ = safetensors_file.read(tmp_path / peft.TENSORS)
    delta = (a[:, 1] @ b[:, 1]).reshape(10, 2, 6).astype(float)  # [d, n, h] of layer 1
    halves = np.concatenate([delta[..., ::2], delta[..., 1::2]], -1).reshape(10, 12).T
    for name, grown in {"q_proj": np.sqrt(6), "k_proj": 1}.items():
        module = f"model.layers.1.self_attn.{name}"
        own = [tensors[f"base_model.model.{module}.lora_{x}.weight"].astype(float) for x in "AB"]
        scale = peft.read_config(tmp_path).scale(module, len(own[0]))
        np.testing.assert_allclose(scale * (own[1] @ own[0]), grown * halves, atol=1e-5)


def test_an_orbax_checkpoint_on_disk(recorded, tmp_path):
    """As tunix's CheckpointManager lays it out: a step, the item of the parameters, and more."""
    import orbax.checkpoint as ocp
    from flax import nnx

    factors, deltas = recorded["tunix llama3"]
    state = nnx.State(jax.tree.map(nnx.Param, tree_of(factors, deltas)))
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run" / "7" / "model_params", state)
    params = orbax.load(tmp_path / "run", "tunix", alpha=4.5)
    for path, node in adapted_nodes(params).items():
        np.testing.assert_allclose(plain(node), deltas[path], atol=1e-6)
    with pytest.raises(
        lora_jax.ConfigError, match="checkpoints do not hold alpha: pass the alpha="
    ):
        orbax.load(tmp_path / "run", "tunix")
    metadata = {"metrics": {}, "custom_metadata": {"lora": {"lora_rank": 3, "lora_alpha": 4.5}}}
    (tmp_path / "run" / "7" / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))  # MaxText's
    jax.tree.map(np.testing.assert_array_equal, params, orbax.load(tmp_path / "run", "tunix"))
    orbax.save(tmp_path / "again", params, "tunix", alpha=4.5)
    again = orbax.load(tmp_path / "again", "tunix", alpha=4.5)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    with pytest.raises(FileExistsError, match="again: exists already; give another directory"):
        orbax.save(tmp_path / "again", params, "tunix", alpha=4.5)
    with pytest.raises(
        lora_jax.AdapterFileError, match=r"not an Orbax checkpoint: it has no _META"
    ):
        orbax.load(tmp_path / "nothing", "tunix", alpha=1)


def bare(**more):
    f = lambda *shape: np.ones(shape, "f4")
    leaves = {"kernel": f(4, 3), "kernel_lora_a": f(4, 2), "kernel_lora_b": f(2, 3)}
    return {"up": leaves | more}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"up": {"kernel": np.ones((4, 3), "f4")}}, "it has no LoRA factors"),
        (
            bare(kernel_lora_b=np.ones((2, 4), "f4")),
            r"do not fit each other: \(4, 3\), \(4, 2\), \(2",
        ),
        (bare(kernel_lora_a=np.ones((4, 2), "i4")), "A is int32, but only floating numbers"),
        (bare(kernel_lora_a=np.full((4, 2), np.nan, "f4")), "up/kernel_lora_a: contains NaN"),
        (bare(kernel={"array": 1}), "its weight up/kernel is not there; pass base="),
        (bare(lora_c=np.ones(3, "f4")), "up/lora_c: not a factor of this format"),
        ({"up": {"kernel_lora_b": np.ones((2, 3), "f4")}}, "has no up/kernel_lora_a beside it"),
        (
            {"up": {"kernel": np.ones((4, 3), "f4"), "kernel_lora_a": np.ones((4, 2), "f4")}},
            "has no up/kernel_lora_b beside it",
        ),
        ({"model": bare(), "head": bare(kernel_lora_b=1)}, r"head/up/kernel_lora_a: B is 1, not"),
    ],
)
def test_what_does_not_fit_is_listed(tree, message):
    with pytest.raises(lora_jax.AdapterFileError, match=message):
        orbax.from_tree(tree, "tunix", alpha=2)


@pytest.mark.parametrize(
    "keys", [["model"], ["params", "params"], ["state", "model"], ["train_state"]]
)
def test_a_training_state_has_one_set_of_parameters(keys):
    """The moments of its optimizer have the names of factors too."""
    tree = {"layers": bare()}
    for key in reversed(keys):
        tree = {key: tree, "step": np.array(1), "opt_state": {"mu": {"layers": bare()}}}
    params = orbax.from_tree(tree, "tunix", alpha=2)
    assert list(adapted_nodes(params)) == ["layers/up/kernel"]
    assert {path_of(path) for path, _ in leaves_of(params)} == {"layers/up/kernel"}


def test_scales_and_formats_are_asked_for():
    with pytest.raises(lora_jax.ConfigError, match="tunix's checkpoints do not hold alpha: pass"):
        orbax.from_tree(bare(), "tunix")
    with pytest.raises(lora_jax.ConfigError, match="has no scale: leave out alpha and rslora"):
        orbax.from_tree(bare(), "gemma", alpha=2)
    with pytest.raises(
        lora_jax.ConfigError, match=r"'t5x' is not a format of checkpoints, only op"
    ):
        orbax.from_tree(bare(), "t5x")
    params = orbax.from_tree(bare(), "tunix", alpha=2)
    with pytest.raises(lora_jax.ConfigError, match="up/kernel: tunix's weights have no Hugging Fa"):
        orbax.to_peft("nowhere", params, "tunix")
    other = lora_jax.join(
        {"down": jnp.ones((4, 3))}, {"down": lora_jax.split(params)[1]["up"]["kernel"]}
    )
    with pytest.raises(lora_jax.StructureError, match="down: no row of this format has this path"):
        orbax.to_tree(other, "tunix")


def test_as_many_layers_as_ranks():
    """16 layers and a rank of 16: the stack is at the same place in A and in B."""
    f = lambda *shape: np.random.default_rng(0).normal(size=shape).astype("f4")
    a, b = f(5, 2, 2), f(2, 2, 7)  # [in, layers, rank] and [rank, layers, out]
    kernel = {"kernel": f(5, 2, 7), "kernel_lora_a": a, "kernel_lora_b": b}
    params = orbax.from_tree({"decoder": {"layers": {"mlp": {"wi_0": kernel}}}}, "maxtext", alpha=2)
    node = params["decoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    np.testing.assert_allclose(plain(node), np.einsum("ilr,rlo->ilo", a, b), rtol=1e-5)
    square = {"gating_einsum": f(2, 6, 6), "_LoRAEinsum_gating_einsum": {"lora": {"a": f(6, 2)}}}
    square["_LoRAEinsum_gating_einsum"]["lora"]["b"] = f(2, 2, 6)
    with pytest.raises(lora_jax.AdapterFileError, match="sizes that are equal leave open"):
        orbax.from_tree({"mlp": square}, "gemma")


def test_maxtexts_own_adapters():
    """Its `apply_lora_on_base_params`: einsum("br,rnd->bnd") of the older files' factors."""
    f = lambda *shape: np.random.default_rng(len(shape)).normal(size=shape).astype("f4")
    query = {"kernel": f(6, 2, 4), "lora_a.kernel": f(6, 3), "lora_b.kernel": f(3, 2, 4)}
    tree = {"decoder": {"layers_0": {"self_attention": {"query": query}}}}
    params = orbax.from_tree({"params": {"params": tree}}, "maxtext", alpha=6)
    node = params["decoder"]["layers_0"]["self_attention"]["query"]["kernel"]
    wanted = 2 * np.einsum("br,rnd->bnd", query["lora_a.kernel"], query["lora_b.kernel"])
    np.testing.assert_allclose(plain(node), wanted, rtol=1e-5)
