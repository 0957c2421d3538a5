"""Where adapters lie on a mesh: as the axes of their weight, but those of the examples."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import LoraConfig
from lora_jax.files.naming import Entry, Naming
from tests.programs import is_node, normal, randomize

KEY = jax.random.key(0)
STACKED = {"stack": {"layout": "bio"}, "heads": {"layout": "ioo"}}


def make_mesh(kind=AxisType.Auto, **axes):
    axes = axes or {"fsdp": 2, "tensor": 2, "expert": 2}
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


MESH = make_mesh()


def put(shape, *entries, mesh=MESH, seed=1, dtype=jnp.float32):
    return jax.device_put(normal(seed, shape, dtype), NamedSharding(mesh, P(*entries)))


def specs(tree):
    """The specification of each array, with an entry per axis."""
    shardings = jax.tree.map(lambda x: x.sharding, tree)
    return jax.tree.map(lambda s, x: (*s.spec, *[None] * (x.ndim - len(s.spec))), shardings, tree)


def base():
    return {
        "up": put((8, 16), "fsdp", "tensor"),
        "down": put((16, 8), "tensor", "fsdp"),
        "both": put((8, 16), None, ("fsdp", "tensor")),
        "heads": put((8, 4, 4), "fsdp", "tensor"),
        "stack": put((4, 8, 16), "expert", "fsdp", "tensor"),
        "bias": put((16,), ("fsdp", "tensor")),
        "norm": put((8,)),
    }


CONFIG = LoraConfig(rank=2, dora=True, overrides=STACKED, bias="all", train=["norm"])
#: Per weight: of A, B, and the magnitude; worked out by hand.
WANTED = {
    "up": ((None, None), (None, "tensor"), ("tensor",)),
    "down": (("tensor", None), (None, None), (None,)),
    "both": ((None, None), (None, "tensor"), ("tensor",)),
    "heads": ((None, None), (None, "tensor", None), ("tensor", None)),
    "stack": (("expert", None, None), ("expert", None, "tensor"), ("expert", "tensor")),
}


def check(tree):
    got = specs(tree)
    for name, (a, b, magnitude) in WANTED.items():
        assert (got[name].a, got[name].b, got[name].magnitude) == (a, b, magnitude), name
    assert got["stack"].scale == ("expert",) and got["up"].scale == ()
    assert got["bias"].value == (("fsdp", "tensor"),) and got["norm"].value == (None,)
    shardings = [x.sharding for x in jax.tree.leaves(tree)]
    assert all(isinstance(x, NamedSharding) and x.mesh == MESH for x in shardings)


def values(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def test_init_places_by_the_rule_and_shardings_agrees():
    params = base()
    tree = lora_jax.init(KEY, params, CONFIG)
    check(tree)
    assert all(tree[name].w is params[name] for name in params)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    abstract = lora_jax.init(KEY, shapes, CONFIG)
    wanted = jax.tree.map(lambda x: x.sharding, tree)
    for found in (
        jax.tree.map(lambda x: x.sharding, abstract),
        lora_jax.shardings(tree),
        lora_jax.shardings(abstract),
        lora_jax.shardings(params, CONFIG),
        lora_jax.shardings(shapes, CONFIG),
        lora_jax.shardings(tree, fsdp="fsdp"),
    ):
        assert jax.tree.structure(found) == jax.tree.structure(tree)
        assert jax.tree.all(jax.tree.map(lambda x, y: x == y, found, wanted))
    nowhere = jax.tree.map(np.asarray, params)
    # eager, on one device: the same values to the bit, except the sums of the norms
    for got, want in zip(values(tree), values(lora_jax.init(KEY, nowhere, CONFIG)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=0)


def test_under_jit_with_the_tree_of_shardings():
    params = base()
    out = lora_jax.shardings(params, CONFIG)
    tree = jax.jit(lambda p: lora_jax.init(KEY, p, CONFIG), out_shardings=out)(params)
    check(tree)


@pytest.mark.parametrize("init", ["orthogonal", "pissa", "pissa_fast", "olora", "loftq"])
def test_every_initializer(init):
    params = {name: x for name, x in base().items() if name in ("up", "stack")}
    config = LoraConfig(rank=2, init=init, overrides={"stack": {"layout": "bio"}})
    tree = lora_jax.init(KEY, params, config)
    got = specs(tree)
    for name in params:
        assert (got[name].a, got[name].b) == WANTED[name][:2]
        assert tree[name].w.sharding == params[name].sharding


def product(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def test_initializers_from_batches():
    params = {name: base()[name] for name in ("up", "down")}
    x = put((8, 8), "fsdp", seed=7)
    tree = lora_jax.init(KEY, params, LoraConfig(rank=2), product, x)
    loss = lambda p, x: (product(p, x) ** 2).mean()
    for new in (
        lora_jax.eva(product, tree, [(x,)], rho=1),
        lora_jax.lora_ga(loss, tree, [(x,)]),
    ):
        got = specs(new)
        for name in params:
            assert (got[name].a, got[name].b) == WANTED[name][:2]
            assert new[name].w.sharding == params[name].sharding


def test_extract():
    params = {name: base()[name] for name in ("up", "down")}
    tuned = jax.tree.map(lambda x: x * 1.5, params)
    overlay, _ = lora_jax.extract(params, tuned, 2)
    got = specs(overlay)
    assert [(got[n].a, got[n].b) for n in params] == [WANTED[n][:2] for n in params]


def test_trained_rows():
    params = {"embedding": put((12, 8), "tensor", ("fsdp", "expert"))}
    config = LoraConfig(targets=[], rows={"embedding": [3, 5]})
    node = lora_jax.init(KEY, params, config)["embedding"]
    assert specs(node).value == (None, "expert")
    np.testing.assert_array_equal(node.value, np.asarray(params["embedding"])[[3, 5]])


def test_layers_left_out():
    params = {"stack": base()["stack"]}
    config = LoraConfig(rank=2, overrides={"stack": {"layout": "bio"}}, layers=[1])
    got = specs(lora_jax.init(KEY, params, config))["stack"]
    assert (got.a, got.b, got.scale) == (*WANTED["stack"][:2], ("expert",))


# --- Files ----------------------------------------------------------------------------------------

NAMING = Naming((Entry("{*m}.weight", "{*m}/kernel", "linear"), Entry("{*m}.bias", "{*m}/bias")))


@pytest.mark.parametrize("dora", [False, True])
def test_files(tmp_path, dora):
    whole = base()
    params = {name: {"kernel": whole[name]} for name in ("up", "down")}
    params["up"]["bias"] = whole["bias"]
    config = LoraConfig(rank=2, dora=dora, bias="all")
    tree = lora_jax.init(KEY, params, config)
    lora_jax.save(tmp_path / "a.safetensors", tree, config=config)
    lora_jax.peft.save(tmp_path / "peft", tree, NAMING, config=config)
    no_bias = lora_jax.init(KEY, params, dataclasses.replace(config, bias="none"))
    lora_jax.mlx.save(tmp_path / "mlx", no_bias, NAMING)
    for overlay in (
        lora_jax.load(tmp_path / "a.safetensors", params),
        lora_jax.peft.load(tmp_path / "peft", params, NAMING),
        lora_jax.mlx.load(tmp_path / "mlx", params, NAMING),
    ):
        got = specs(overlay)
        for name in ("up", "down"):
            assert (got[name]["kernel"].a, got[name]["kernel"].b) == WANTED[name][:2]
            np.testing.assert_array_equal(overlay[name]["kernel"].a, tree[name]["kernel"].a)
            if dora:
                assert got[name]["kernel"].magnitude == WANTED[name][2]
    named = lora_jax.load(tmp_path / "a.safetensors", params, fsdp=("tensor",))
    assert specs(named)["up"]["kernel"].a == ("fsdp", None)


def test_a_file_of_loralib(tmp_path):
    from lora_jax.files.disk import safetensors_file

    params = {"up": {"kernel": base()["up"]}}
    tensors = {"up.lora_A": np.ones((2, 8), "f4"), "up.lora_B": np.ones((16, 2), "f4")}
    safetensors_file.write(tmp_path / "l.safetensors", tensors)
    overlay = lora_jax.loralib.load(tmp_path / "l.safetensors", params, NAMING, alpha=2)
    got = specs(overlay)["up"]["kernel"]
    assert (got.a, got.b, got.scale) == (*WANTED["up"][:2], ())


# --- Which axes shard the examples ----------------------------------------------------------------

XY = make_mesh(x=2, y=2, z=2)


def of_xyz(*entries, **options):
    """The specifications of A and B of a weight [8, 16] on axes whose names say nothing."""
    args, kwargs = options.pop("batch", ()), options
    fn = (lambda p, *args: args[0] @ p["w"]) if args else None
    params = {"w": put((8, 16), *entries, mesh=XY)}
    got = specs(lora_jax.init(KEY, params, LoraConfig(rank=2), fn, *args, **kwargs))["w"]
    return got.a[0], got.b[1]


def test_axes_of_the_batch():
    x = lambda *entries: put((8, 8), *entries, mesh=XY)
    assert of_xyz("x", "y") == ("x", "y")  # names that say nothing: tensor axes
    assert of_xyz("x", "y", batch=[x("x")]) == (None, "y")
    assert of_xyz("x", "y", batch=[x()]) == ("x", "y")
    assert of_xyz(("x", "z"), "y", batch=[x(("z", "x"))]) == (None, "y")
    assert of_xyz(("x", "z"), "y", batch=[x("z", "y")]) == ("x", "y")  # its first sharded axis
    assert of_xyz("x", "y", batch=[x(("x", "z")), x("z")]) == (None, "y")
    shape = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=x("x").sharding)
    assert of_xyz("x", "y", batch=[shape]) == (None, "y")
    assert of_xyz("x", "y", fsdp="y") == ("x", None)
    assert of_xyz("x", "y", fsdp=(), batch=[x("x")]) == ("x", "y")


def test_axes_that_do_not_agree():
    x = lambda *entries: put((8, 8), *entries, mesh=XY)
    with pytest.raises(lora_jax.ConfigError, match=r"do not agree \(0: x; 1: y\).*fsdp="):
        of_xyz("x", "y", batch=[x("x"), x("y")])
    assert of_xyz("x", "y", batch=[x("x"), x("y")], fsdp="x") == (None, "y")


def test_experts_stay_sharded_along_an_axis_of_the_batch():
    """Tokens are sharded along "expert" too, which shards other weights to save memory alone."""
    params = {"experts": put((4, 8, 16), "expert"), "w": put((16, 8), "expert")}
    x = put((4, 4, 8), ("expert", "fsdp"))
    fn = lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["experts"]) @ p["w"]
    got = specs(lora_jax.init(KEY, params, LoraConfig(rank=2), fn, x))
    assert got["experts"].a == ("expert", None, None) and got["w"].a == (None, None)


@pytest.mark.parametrize("fsdp", ["fdsp", ("fsdp", "model")])
def test_names_of_no_axis(fsdp, tmp_path):
    params = base()
    lora_jax.save(tmp_path / "a", lora_jax.init(KEY, params, CONFIG))
    message = "fsdp names .*, but the base lies on a mesh with the axes 'fsdp', 'tensor', 'expert'"
    for call in (
        lambda: lora_jax.init(KEY, params, CONFIG, fsdp=fsdp),
        lambda: lora_jax.shardings(params, CONFIG, fsdp=fsdp),
        lambda: lora_jax.load(tmp_path / "a", params, fsdp=fsdp),
    ):
        with pytest.raises(lora_jax.ConfigError, match=message):
            call()
    lora_jax.init(KEY, jax.tree.map(np.asarray, params), CONFIG, fsdp=fsdp)  # on no mesh


def test_not_names():
    with pytest.raises(lora_jax.ConfigError, match="fsdp must be the names of mesh axes"):
        lora_jax.init(KEY, base(), CONFIG, fsdp=3)
    with pytest.raises(lora_jax.ConfigError, match="give the config too"):
        lora_jax.shardings(base(), None, product)


# --- Other places ---------------------------------------------------------------------------------


def test_sizes_that_the_mesh_does_not_divide():
    def of(shape, *entries):
        w = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, P(*entries)))
        node = lora_jax.init(KEY, {"w": w}, LoraConfig(rank=2))["w"]
        return node.a.sharding.spec, node.b.sharding.spec

    assert of((7, 6), "tensor", "expert") == (P(), P(None, "expert"))
    assert of((8, 6), None, ("expert", "tensor")) == (P(), P())


def test_a_weight_on_no_mesh_beside_others_that_are():
    params = {"up": base()["up"], "norm": jnp.ones(8), "bias": np.ones(16, np.float32)}
    tree = lora_jax.init(KEY, params, LoraConfig(rank=2, train=["norm", "bias"]))
    assert tree["norm"].w is params["norm"] and tree["norm"].value.sharding.mesh == MESH
    found = lora_jax.shardings(tree)
    assert found["norm"].w == found["bias"].value == NamedSharding(MESH, P())
    bound = jax.device_put(jnp.ones(8), jax.devices()[1])  # to a device: it stays there
    tree = lora_jax.init(KEY, {**params, "norm": bound}, LoraConfig(rank=2, train=["norm"]))
    assert tree["norm"].value.devices() == {jax.devices()[1]}


def test_one_device():
    params = {"w": jnp.ones((8, 4))}
    tree = lora_jax.init(KEY, params, LoraConfig(rank=2))
    assert not tree["w"].a.committed
    assert lora_jax.shardings(tree)["w"].a == tree["w"].a.sharding
    abstract = jax.eval_shape(lambda: tree)
    assert lora_jax.shardings(abstract)["w"].b.device_set == {jax.devices()[0]}


def test_explicit_axes_are_known_under_tracing():
    mesh = make_mesh(AxisType.Explicit, fsdp=2, tensor=2)
    params = {"up": put((8, 16), "fsdp", "tensor", mesh=mesh)}
    make = lambda p: lora_jax.init(KEY, p, LoraConfig(rank=2))
    for node in (
        make(params)["up"],
        jax.jit(make)(params)["up"],
        jax.eval_shape(make, params)["up"],
    ):
        assert node.b.sharding.spec == P(None, "tensor")
        assert not any(node.a.sharding.spec)


def test_an_overlay():
    tree = lora_jax.init(KEY, base(), CONFIG)
    _, adapters = lora_jax.split(tree)
    found = lora_jax.shardings(adapters)
    assert jax.tree.structure(found) == jax.tree.structure(adapters)
    assert jax.tree.all(jax.tree.map(lambda s, x: s == x.sharding, found, adapters))


# --- A loop compiles once -------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["joined", "split"])
def test_a_loop_compiles_once_and_keeps_its_shardings(form):
    params = {name: base()[name] for name in ("up", "down")}
    x = put((8, 8), "fsdp", seed=7)
    config = LoraConfig(rank=2, dora=True)
    tree = lora_jax.init(KEY, params, config, product, x)
    frozen, trained = lora_jax.split(tree) if form == "split" else (None, tree)
    tx = lora_jax.freeze(optax.adam(1e-2), trained)
    run = lora_jax.lora(product)

    @jax.jit
    def step(frozen, trained, state, x):
        whole = lambda t: t if frozen is None else lora_jax.join(frozen, t)
        grads = jax.grad(lambda t: (run(whole(t), x) ** 2).mean())(trained)
        updates, state = tx.update(grads, state, trained)
        return lora_jax.apply_updates(trained, updates), state

    state, before = tx.init(trained), jax.tree.map(lambda x: x.sharding, trained)
    for _ in range(3):
        trained, state = step(frozen, trained, state, x)
    assert step._cache_size() == 1
    after = jax.tree.map(lambda x: x.sharding, trained)
    assert jax.tree.all(jax.tree.map(lambda x, y: x == y, before, after))
    nodes = [x for x in jax.tree.leaves(trained, is_leaf=is_node) if is_node(x)]
    moments = jax.tree.leaves(state.inner_states["train"].inner_state[0].mu)
    assert {x.sharding for x in moments} == {
        y.sharding for n in nodes for y in (n.a, n.b, n.magnitude)
    }


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_make_step_compiles_once(accumulate):
    from lora_jax import training

    params = {name: base()[name] for name in ("up", "down")}
    batch = {"x": put((8, 8), "fsdp", seed=7)}
    tree = lora_jax.init(KEY, params, LoraConfig(rank=2), product, batch["x"])
    frozen, adapters = lora_jax.split(tree)

    def loss(params, batch):
        out = product(params, batch["x"])
        return {"loss": (out**2).sum(), "weight": jnp.float32(out.size)}

    tx = training.Optimizer(1e-2).transformation(adapters, steps=3)
    state, step = training.init_state(adapters, tx), training.make_step(loss, tx, accumulate)
    assert all(isinstance(x.sharding, NamedSharding) for x in jax.tree.leaves(state))
    before, losses = jax.tree.map(lambda x: x.sharding, state), []
    for _ in range(3):
        state, measured = step(state, frozen, batch)
        losses.append(float(measured["loss"]))
    assert step._cache_size() == 1 and losses[2] < losses[0]
    assert jax.tree.all(jax.tree.map(lambda x, y: x == y.sharding, before, state))


# --- Inside shard_map, in boxes -------------------------------------------------------------------


def test_a_manual_mesh():
    """`lora` inside `shard_map`: Megatron's layer, whose one sum serves W and the factors."""
    mesh = make_mesh(data=2, tensor=4)
    params = {
        "up": put((8, 16), None, "tensor", mesh=mesh),
        "down": put((16, 8), "tensor", mesh=mesh, seed=2),
    }
    x = put((4, 8), "data", mesh=mesh, seed=3)
    tree = lora_jax.init(KEY, params, LoraConfig(rank=2), product, x)
    tree = jax.device_put(randomize(tree), lora_jax.shardings(tree))
    specs = jax.tree.map(lambda s: s.spec, lora_jax.shardings(tree))

    def layer(params, x):
        return jax.lax.psum(lora_jax.lora(product)(params, x), "tensor")

    options = {"mesh": mesh, "in_specs": (specs, P("data")), "out_specs": P("data")}
    run = jax.jit(jax.shard_map(layer, **options))
    loss = lambda run, p, x: (run(p, x) ** 2).mean()
    nodes = jax.tree.map(np.asarray, tree)
    plain = {
        name: n.w.astype(np.float64) + n.scale * n.a.astype(np.float64) @ n.b
        for name, n in nodes.items()
    }
    want = np.tanh(np.asarray(x, np.float64) @ plain["up"]) @ plain["down"]
    np.testing.assert_allclose(run(tree, x), want, rtol=2e-5, atol=1e-5)
    got = jax.grad(loss, argnums=1)(run, tree, x)
    whole = jax.grad(loss, argnums=1)(lora_jax.lora(product), nodes, np.asarray(x))
    for name in params:
        for field in ("a", "b"):
            pair = getattr(got[name], field), getattr(whole[name], field)
            np.testing.assert_allclose(*pair, rtol=2e-5, atol=1e-5)


def test_boxes_of_flax_keep_their_names_and_their_arrays_their_places():
    import flax.linen as nn
    from flax import nnx

    box = lambda x: nn.Partitioned(x, names=("fsdp", "tensor"))
    params = {"up": box(base()["up"])}
    fn = lambda params, x: x @ params["up"].value
    x = put((8, 8), "fsdp", seed=7)
    tree = lora_jax.init(KEY, params, LoraConfig(rank=2), fn, x)
    frozen, adapters = lora_jax.split(tree)
    for found in (tree, lora_jax.join(frozen, adapters)):
        assert found["up"].names == ("fsdp", "tensor")
        assert specs(found)["up"].value.b == WANTED["up"][1]
    assert frozen["up"].value is params["up"].value
    assert frozen["up"].names == lora_jax.merge(tree)["up"].names == ("fsdp", "tensor")
    by_name = lora_jax.partition_specs(tree)["up"]
    assert (by_name.w, by_name.a, by_name.b) == (
        P("fsdp", "tensor"),
        P(None, None),
        P(None, "tensor"),
    )
    assert lora_jax.partition_specs(tree, fsdp=())["up"].a == P("fsdp", None)

    with jax.set_mesh(MESH):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("fsdp", "tensor"))
        model = nnx.Linear(8, 16, kernel_init=init, rngs=nnx.Rngs(0))
        model = lora_jax.init(KEY, model, LoraConfig(rank=2), lambda net, x: net(x), x)
    node = model.kernel.get_value()
    assert node.w.sharding.spec == P("fsdp", "tensor") and node.b.sharding.spec == P(None, "tensor")
    assert node.a.sharding.spec == P()
