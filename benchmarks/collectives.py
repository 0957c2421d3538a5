"""What communication a training step on a mesh compiles to: `python -m benchmarks.collectives`.

Every mesh compiles two programs ahead of time: the loss of the frozen model with its gradient with
respect to the activations that enter it, and the same with the gradients of the adapters and the
optimizer's update. On eight forced CPU devices, or for a TPU that need not be there.
"""

import argparse
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

import lora_jax
from benchmarks import decoder, hlo
from benchmarks.report import versions
from lora_jax import Forms, LoraConfig
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.weights import is_adapted

Counts = Counter[str]

#: What the forms of an accelerator are, on a CPU too.
ACCELERATOR = Forms.for_backend("gpu")

#: The columns of the table.
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

#: By name: the sizes of the axes of eight devices.
MESHES: Mapping[str, Mapping[str, int]] = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 8},
    "fsdp x tensor": {"fsdp": 2, "tensor": 4},
    "data x fsdp x tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "expert": {"expert": 8},
    "data x expert": {"data": 2, "expert": 4},
}

#: How the parameters of the decoder lie: Megatron's axes, and the other one for FSDP.
_OPENS, _CLOSES = P("fsdp", "tensor"), P("tensor", "fsdp")
SPECS = {
    **dict.fromkeys(("q", "k", "v", "up"), _OPENS),
    **dict.fromkeys(("o", "down"), _CLOSES),
    "unembed": _OPENS,
    "experts_up": P("expert", "fsdp", "tensor"),
    "experts_down": P("expert", "tensor", "fsdp"),
}
BATCH = P(("data", "fsdp"))


class Program(NamedTuple):
    """A loss of parameters, activations `[batch, time, width]` and targets `[batch, time]`."""

    loss: Callable[..., Any]
    params: Any  # of shapes
    targets: list[str]


def decoder_program(size: decoder.Size, variant: str) -> Program:
    """Return the decoder of the benchmarks, from its embeddings to its loss."""
    shapes = jax.eval_shape(lambda: decoder.init(size, variant))
    params = {name: shapes[name] for name in ("layers", "norm", "unembed")}

    def loss(params: Any, x: jax.Array, targets: jax.Array) -> jax.Array:
        x = decoder.blocks(x, params["layers"], size.heads, variant)
        return decoder.cross_entropy(params, x, targets)

    return Program(loss, params, list(decoder.ADAPTED))


def experts_program(size: decoder.Size, experts: int = 8) -> Program:
    """Return two layers of experts; each token goes to all of them with a weight of its own."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    layer = {
        "router": shape(size.width, experts),
        "experts_up": shape(experts, size.width, 2 * size.width),
        "experts_down": shape(experts, 2 * size.width, size.width),
    }
    norms = {"norm": shape(size.width), "unembed": shape(size.width, size.vocabulary)}

    def loss(params: Any, x: jax.Array, targets: jax.Array) -> jax.Array:
        for p in params["layers"]:
            weights = jax.nn.softmax(x @ p["router"])
            tokens = jnp.broadcast_to(x, (experts, *x.shape))
            h = jax.nn.gelu(jnp.einsum("ebtd,edf->ebtf", tokens, p["experts_up"]))
            out = jnp.einsum("ebtf,efd->ebtd", h, p["experts_down"])
            x = x + jnp.einsum("ebtd,bte->btd", out, weights)
        return decoder.cross_entropy(params, x, targets)

    return Program(loss, {"layers": [layer] * 2, **norms}, ["experts_up", "experts_down"])


def make_mesh(axes: Mapping[str, int], devices: Any = None) -> Mesh:
    """Return a mesh of eight devices, by default the first ones."""
    found = np.asarray(jax.devices()[:8] if devices is None else devices)
    return Mesh(found.reshape(*axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def on_mesh(mesh: Mesh, x: Any, spec: P) -> jax.ShapeDtypeStruct:
    """Return the shape of an array that lies on the mesh by the axes of `spec` that it has.

    `spec` is for the last axes, as for a stack of layers.
    """

    def kept(entry: Any) -> Any:
        names = entry if isinstance(entry, tuple) else (entry,)
        found = tuple(name for name in names if name in mesh.shape)
        return found or None

    entries = [None] * (len(x.shape) - len(spec)) + [kept(entry) for entry in spec]
    while entries and entries[-1] is None:  # as JAX writes the shardings of results
        entries.pop()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(*entries)))


def arguments(program: Program, size: decoder.Size, mesh: Mesh) -> tuple[Any, Any, Any]:
    """Return the parameters, the activations and the targets as shapes that lie on the mesh."""

    def one(path: Any, x: Any) -> Any:
        return on_mesh(mesh, x, SPECS.get(path[-1].key, P()))

    params = jax.tree_util.tree_map_with_path(one, program.params)
    batch = (size.batch, size.time)
    pad = lambda x: on_mesh(mesh, x, P(*BATCH, *[None] * (len(x.shape) - 1)))
    x = pad(jax.ShapeDtypeStruct((*batch, size.width), jnp.float32))
    return params, x, pad(jax.ShapeDtypeStruct(batch, jnp.int32))


def frozen_step(program: Program) -> Callable[..., Any]:
    """Return the loss and its gradient with respect to the activations."""
    return jax.value_and_grad(program.loss, argnums=1)


def adapted_step(
    program: Program, adapters: Any, forms: Forms | None
) -> tuple[Callable[..., Any], optax.GradientTransformation]:
    """Return a step that also updates the adapters, and its optimizer."""
    tx = lora_jax.freeze(optax.adam(1e-3), adapters)
    run = lora_jax.lora(program.loss, forms=forms)

    def step(base: Any, x: Any, targets: Any, adapters: Any, state: Any) -> Any:
        loss = lambda adapters, x: run(lora_jax.join(base, adapters), x, targets)
        value, (grads, dx) = jax.value_and_grad(loss, (0, 1))(adapters, x)
        updates, state = tx.update(grads, state, adapters)
        return value, dx, lora_jax.apply_updates(adapters, updates), state

    return step, tx


def state_on_mesh(tx: Any, adapters: Any, mesh: Mesh) -> Any:
    """Return the optimizer's state as shapes on the mesh, placed as the adapters are."""
    nodes, _ = flatten_with_paths(adapters, is_leaf=is_adapted)
    own = {f"{path}/{f.name}": getattr(n, f.name) for path, n in nodes.items() for f in fields(n)}
    leaves, treedef = flatten_with_paths(jax.eval_shape(tx.init, adapters))

    def one(path: str, x: Any) -> Any:
        like = next((y for name, y in own.items() if path.endswith(f"/{name}")), None)
        whole = NamedSharding(mesh, P())
        sharding = whole if like is None or like.shape != x.shape else like.sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree_util.tree_unflatten(treedef, [one(*item) for item in leaves.items()])


class Counted(NamedTuple):
    """The collectives of the two programs on one mesh."""

    frozen: Counts
    adapted: Counts
    gradients: int  # arrays that train

    @property
    def more(self) -> Counts:
        """How many more the adapted program has; below zero where it has fewer."""
        found = Counter(self.adapted)
        found.subtract(self.frozen)
        return found


def compare(
    program: Program,
    mesh: Mesh,
    size: decoder.Size,
    *,
    forms: Forms | None = ACCELERATOR,
    platform: str | None = None,
) -> Counted:
    """Compile both programs for a mesh and count their collectives."""
    params, x, targets = arguments(program, size, mesh)
    config = LoraConfig(rank=size.rank, targets=program.targets)
    key = jax.random.key(0)
    base, adapters = lora_jax.split(lora_jax.init(key, params, config, program.loss, x, targets))
    step, tx = adapted_step(program, adapters, forms)
    state = state_on_mesh(tx, adapters, mesh)

    def text(fn: Callable[..., Any], *args: Any) -> str:
        traced = jax.jit(fn).trace(*args)
        lowered = traced.lower(lowering_platforms=(platform,)) if platform else traced.lower()
        return lowered.compile().as_text()

    return Counted(
        hlo.count(text(frozen_step(program), params, x, targets)),
        hlo.count(text(step, base, x, targets, adapters, state)),
        sum(jax.tree.leaves(lora_jax.mask(adapters))),
    )


def programs(size: decoder.Size, mesh_name: str) -> dict[str, Program]:
    """Return the programs that fit a mesh, by name."""
    if "expert" in mesh_name:
        return {"experts": experts_program(size)}
    return {variant: decoder_program(size, variant) for variant in decoder.VARIANTS}


def devices_of(topology: str | None) -> tuple[Any, str | None]:
    """Return eight devices and their platform: forced ones of the CPU, or of a TPU's topology."""
    if topology is None:
        return jax.devices()[:8], None
    from jax.experimental import topologies

    return topologies.get_topology_desc(topology, platform="tpu").devices[:8], "tpu"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", help="of a TPU, compiled for ahead of time: v5e:2x4")
    parser.add_argument("--mesh", choices=[*MESHES], action="append", help="by default all")
    args = parser.parse_args()
    forced = "--xla_force_host_platform_device_count=8"  # read when JAX starts its backend
    os.environ["XLA_FLAGS"] = f"{forced} {os.environ.get('XLA_FLAGS', '')}"
    devices, platform = devices_of(args.topology)
    size = decoder.Size(layers=2, width=64, heads=8, vocabulary=128, batch=8, time=16)
    table = Table("mesh", "program", *KINDS, "arrays that train")
    for name in args.mesh or MESHES:
        mesh = make_mesh(MESHES[name], devices)
        for variant, program in programs(size, name).items():
            found = compare(program, mesh, size, platform=platform)
            cells = [f"{found.frozen[kind]} {found.more[kind]:+}" for kind in KINDS]
            table.add_row(name, variant, *cells, str(found.gradients))
    console = Console(width=120)
    console.print(f"{versions()}; {devices[0].device_kind}, 8 devices")
    console.print("collectives of the frozen model, and how many more a training step has")
    console.print(table)


if __name__ == "__main__":
    main()
