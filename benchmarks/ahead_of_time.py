"""Training steps compiled for accelerators that are not there, in tables of exact figures.

    python -m benchmarks.ahead_of_time

For each mesh: what one device computes, moves and keeps in a step of the reference Llama in
`training.make_step`, by XLA for that very device, and the bound that follows for its speed. Nothing
is allocated: parameters are shapes with shardings. What the chips can do is `topologies.CHIPS`.

    python -m benchmarks.ahead_of_time --topology v5p:2x2x1 --mesh tensor=4 --mesh fsdp=4
    python -m benchmarks.ahead_of_time --topology h100:8 --mesh fsdp=4,tensor=2 --remat sums
    python -m benchmarks.ahead_of_time --branch --topology h100:1  # forms of the branch, 4 layers
"""

import argparse
import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

import lora_jax
from benchmarks import hlo, topologies
from benchmarks.report import versions
from lora_jax import models, training
from lora_jax.engine.forms import PLAIN, Forms
from lora_jax.models import attention
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.module import Decoder
from lora_jax.models.weights import sharding_rules
from lora_jax.training.running.flops import flops

SEVEN = ("query", "key", "value", "output", "gate", "up", "down")
#: Shapes of the model: Llama 3 8B, the four layers of the branch's table, and what a test compiles.
MODELS = {
    "8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "branch": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 4, "num_attention_heads": 32, "max_position_embeddings": 4096,
    },
    "tiny": {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    },
}  # fmt: skip
#: Rows of the branch's table: what a backend gets, each choice of it the other way, and none.
FORMS: dict[str, Callable[[Forms], Forms]] = {
    "the backend's": lambda given: given,
    **{
        f"{'not ' if name in ('narrow', 'apart') else ''}{name}": (
            lambda given, name=name: dataclasses.replace(given, **{name: not getattr(given, name)})
        )
        for name in ("share", "narrow", "apart")
    },
    "as one would write it": lambda given: PLAIN,
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One training step: its model, adapters and batch, and where it runs."""

    topology: str = "h100:1"
    mesh: str = ""  # "fsdp=4,tensor=2"
    model: str = "8b"
    remat: str = "full"
    rank: int = 16
    rows: int = 1  # for each part of the mesh that rows are sharded over
    length: int = 4096
    scan: bool = True

    def config(self) -> DecoderConfig:
        """Return the model's configuration, in bfloat16."""
        half = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
        return DecoderConfig(**MODELS[self.model], **half, scan=self.scan, remat=self.remat)

    def sizes(self) -> dict[str, int]:
        """Return the axes of the mesh."""
        return {
            name: int(size)
            for name, _, size in (part.partition("=") for part in self.mesh.split(",") if part)
        }

    def devices(self) -> Mesh:
        """Return the mesh of compile-only devices."""
        sizes = self.sizes() or {"fsdp": 1}
        found, needed = topologies.devices(self.topology), math.prod(sizes.values())
        if len(found) < needed:
            raise ValueError(
                f"--mesh {self.mesh}: needs {needed} devices, and {self.topology} has {len(found)}"
            )
        return Mesh(np.array(found[:needed]).reshape(*sizes.values()), tuple(sizes))

    def tokens(self) -> int:
        """Return the tokens of a step, on all devices."""
        parts = math.prod(n for name, n in self.sizes().items() if name in ("data", "fsdp"))
        return self.rows * parts * self.length


@dataclasses.dataclass(frozen=True)
class Figures:
    """What one device does and keeps in one step."""

    flops: float
    cost: hlo.Cost
    arguments: int
    temporaries: int
    peak: int

    def seconds(self, chip: topologies.Chip) -> float:
        """Return the least time of a step: its products or its memory, whichever is slower."""
        return max(self.flops / chip.flops, self.cost.bytes / chip.bandwidth)


class Step:
    """A training step of a setting, and that of its frozen base, as shapes."""

    def __init__(self, setting: Setting):
        self.setting, self.mesh = setting, setting.devices()
        self._module = Decoder(setting.config())
        self._key = jax.random.key(0)  # before the mesh is in use, whose devices cannot run
        self._platform = topologies.chip(setting.topology).platform
        self.base = self._shapes_of_base()
        self._batch = self._shapes_of_batch()

    def adapted(self, forms: Forms | None = None) -> Figures:
        """Compile the step that `lora-jax train` runs: gradients of A and B, and AdamW."""
        config = lora_jax.LoraConfig(rank=self.setting.rank, targets=list(SEVEN))
        ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        with self._as_on_the_device():
            fsdp = [name for name in ("data", "fsdp") if name in self.mesh.shape]
            params = lora_jax.init(self._key, self.base, config, self._apply, ids, fsdp=fsdp)
            base, adapters = lora_jax.split(params)
            adapters = jax.tree.map(self._placed, adapters)
            tx = optax.adamw(1e-4)
            state = jax.eval_shape(lambda x: training.init_state(x, tx), adapters)
            state = self._like(state, adapters)
            with _forms(forms or Forms.for_backend(self._platform)):
                step = training.make_step(self._loss, tx)
                return self._compile(step, state, base, self._batch)

    def floor(self) -> Figures:
        """Compile the frozen model, forward and backward to the embedded tokens."""
        rows, length = self._batch["ids"].shape
        width = self._module.config.hidden_size
        x = jax.ShapeDtypeStruct(
            (rows, length - 1, width), jnp.bfloat16, sharding=self._rows_sharded(3)
        )

        def loss(x: jax.Array, base: Any, batch: Any) -> jax.Array:
            def embedded(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
                is_lookup = isinstance(context.module, nn.Embed)
                return x if is_lookup else call(*args, **kwargs)

            with nn.intercept_methods(embedded):
                return self._loss(base, batch)["loss"]

        with self._as_on_the_device():
            return self._compile(jax.jit(jax.value_and_grad(loss)), x, self.base, self._batch)

    def _apply(self, params: Any, ids: jax.Array) -> jax.Array:
        return self._module.apply({"params": params}, ids)

    def _loss(self, params: Any, batch: Any) -> Any:
        hidden = lambda params, ids, _: self._module.apply({"params": params}, ids, method="hidden")
        head = lambda params: params["head"]["kernel"]
        return training.language_sums_of_frozen_head(hidden, head)(params, batch)

    def _compile(self, step: Any, *args: Any) -> Figures:
        traced = step.trace(*args)
        compiled = traced.lower(lowering_platforms=(self._platform,)).compile()
        memory = compiled.memory_analysis()
        return Figures(
            flops=flops(traced.jaxpr) / self.mesh.size,
            cost=hlo.cost(compiled.as_text()),
            arguments=memory.argument_size_in_bytes,
            temporaries=memory.temp_size_in_bytes,
            peak=memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes,
        )

    @contextlib.contextmanager
    def _as_on_the_device(self) -> Iterator[None]:
        """Trace with the mesh in use, and with the attention that the device would get."""
        flash = self._platform == "cuda"
        with jax.set_mesh(_automatic(self.mesh)), contextlib.ExitStack() as stack:
            if flash:
                takes = mock.patch.object(attention, "flash_takes", lambda *_: True)
                stack.enter_context(takes)
            yield

    def _shapes_of_base(self) -> Any:
        ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        shapes = jax.eval_shape(self._module.init, self._key, ids)["params"]
        where = sharding_rules.shardings(shapes, self.mesh, models.RULES, self._module.config)
        place = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
        return jax.tree.map(place, shapes, where)

    def _shapes_of_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (self.setting.tokens() // self.setting.length, self.setting.length + 1)
        rows = self._rows_sharded(2)
        dtypes = {"ids": jnp.int32, "segments": jnp.int32, "weights": jnp.float32}
        return {k: jax.ShapeDtypeStruct(shape, v, sharding=rows) for k, v in dtypes.items()}

    def _rows_sharded(self, axes: int) -> NamedSharding:
        names = tuple(name for name in ("data", "fsdp") if name in self.mesh.shape)
        return NamedSharding(self.mesh, PartitionSpec(names or None, *(None,) * (axes - 1)))

    def _placed(self, x: Any) -> Any:
        """Return a shape that lies on the mesh: replicated, unless it says where."""
        on_mesh = isinstance(getattr(x, "sharding", None), NamedSharding)
        at = x.sharding if on_mesh else NamedSharding(self.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)

    def _like(self, state: Any, adapters: Any) -> Any:
        """Place the state of a step: what has a factor's path lies where the factor does."""
        flat = jax.tree_util.tree_flatten_with_path(adapters)[0]
        where = {path: leaf.sharding for path, leaf in flat}

        def place(path: Any, x: Any) -> Any:
            ends = (where[path[i:]] for i in range(len(path)) if path[i:] in where)
            at = next(ends, NamedSharding(self.mesh, PartitionSpec()))
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)

        return jax.tree_util.tree_map_with_path(place, state)


def _automatic(mesh: Mesh) -> Mesh:
    kinds = (jax.sharding.AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)


@contextlib.contextmanager
def _forms(chosen: Forms) -> Iterator[None]:
    """Take these forms, which are otherwise chosen by the default backend: here it is the CPU."""
    with mock.patch.object(Forms, "for_backend", classmethod(lambda cls, backend=None: chosen)):
        yield


def steps(settings: Sequence[Setting]) -> Table:
    """Compile the step of each setting and its floor, one row per setting."""
    table = Table(title="a training step, per device")
    for heading in ("topology", "mesh", "remat", "rank", "TFLOP", "GB moved", "/ floor"):
        table.add_column(heading, justify="left" if heading in ("topology", "mesh") else "right")
    for heading in ("arguments GB", "temporary GB", "peak GB", "fits", "bound, tokens/s"):
        table.add_column(heading, justify="right")
    table.add_column("collectives of the floor, GB")
    table.add_column("more than the floor")
    for setting in settings:
        chip, step = topologies.chip(setting.topology), Step(setting)
        floor, mine = step.floor(), step.adapted()
        bound = setting.tokens() / mine.seconds(chip)
        table.add_row(
            setting.topology, setting.mesh or "-", setting.remat, str(setting.rank),
            f"{mine.flops / 1e12:.1f}", f"{mine.cost.bytes / 1e9:.1f}",
            f"{mine.cost.bytes / floor.cost.bytes:.3f}",
            *(f"{x / 1e9:.2f}" for x in (mine.arguments, mine.temporaries, mine.peak)),
            "yes" if mine.peak <= chip.memory else "no",
            "-" if math.isnan(bound) else f"{bound:,.0f}",
            hlo.listed(floor.cost.collectives.items()) + "; "
            + hlo.listed(floor.cost.payload.items(), lambda x: f"{x / 1e9:.2f}"),
            hlo.listed(hlo.compare(mine.cost, floor.cost).items()) + "; "
            + f"{(mine.cost.payload.total() - floor.cost.payload.total()) / 1e9:.2f} GB",
        )  # fmt: skip
    return table


def branch(topology: str, ranks: Sequence[int], model: str = "branch", length: int = 2048) -> Table:
    """Compile four unrolled layers with each form of the branch, one row per form and rank."""
    table = Table(title=f"the branch on {topology}: 4 layers, 2 x {length} tokens, with AdamW")
    for heading in ("form", "rank", "GFLOP", "/ floor", "GB moved", "/ floor", "bound / floor"):
        table.add_column(heading, justify="left" if heading == "form" else "right")
    chip = topologies.chip(topology)
    for rank in ranks:
        step = Step(Setting(topology, "", model, "none", rank, rows=2, length=length, scan=False))
        floor = step.floor()
        for name, change in FORMS.items():
            mine = step.adapted(change(Forms.for_backend(chip.platform)))
            table.add_row(
                name, str(rank), f"{mine.flops / 1e9:,.1f}", f"{mine.flops / floor.flops:.3f}",
                f"{mine.cost.bytes / 1e9:.2f}", f"{mine.cost.bytes / floor.cost.bytes:.3f}",
                f"{mine.seconds(chip) / floor.seconds(chip):.3f}",
            )  # fmt: skip
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--topology", default="h100:1", help="v5e:2x4, v5p:2x2x1, h100:8, cpu:8")
    parser.add_argument("--mesh", action="append", help="fsdp=4,tensor=2; may be repeated")
    parser.add_argument("--model", default="8b", choices=MODELS)
    parser.add_argument("--remat", action="append", choices=["none", "sums", "full"])
    parser.add_argument("--rank", type=int, action="append")
    parser.add_argument("--rows", type=int, default=1, help="rows for each part of data and fsdp")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--unrolled", action="store_true", help="layers in a Python loop")
    parser.add_argument("--branch", action="store_true", help="forms of the branch instead")
    given = parser.parse_args(arguments)
    console = Console(width=max(Console().width, 220))  # rich assumes 80 columns in a pipe
    try:
        if given.branch:
            console.print(branch(given.topology, given.rank or [16]))
        else:
            settings = [
                Setting(given.topology, mesh, given.model, remat, rank, given.rows, given.length,
                        not given.unrolled)
                for mesh in given.mesh or [""]
                for remat in given.remat or ["full"]
                for rank in given.rank or [16]
            ]  # fmt: skip
            console.print(steps(settings))
    except (topologies.Unavailable, ValueError) as error:
        sys.exit(f"error: {error}")
    console.print(versions())


if __name__ == "__main__":
    main()
