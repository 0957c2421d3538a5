"""Which axes of a mesh shard the examples, and so no factor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import LoraConfig
from tests.adapters.on_a_mesh import CONFIG, KEY, base, make_mesh, product, put, specs

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
