"""The devices of `lora-jax train`: joining its processes, its mesh, and a model placed on it."""

import contextlib
import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from lora_jax.cli.plurals import count
from lora_jax.cli.train_options import TrainOptions
from lora_jax.core.sharding.placement import put
from lora_jax.models.pretrained import Pretrained
from lora_jax.models.weights import sharding_rules
from lora_jax.training.distributed import mesh as meshes
from lora_jax.training.distributed.joining import join_cluster, join_processes

_HEADS = ("num_key_value_heads", "num_attention_heads")


def join(options: TrainOptions) -> None:
    """Join the other processes of the run, if there are any; before JAX looks for devices.

    Raises:
      TrainingError: they cannot be joined.
    """
    if options.coordinator is not None:
        assert options.processes is not None and options.process_id is not None
        join_processes(options.coordinator, options.processes, options.process_id)
    elif options.mesh is not None:
        join_cluster()


def open_mesh(options: TrainOptions) -> Mesh | None:
    """Return the mesh that the options ask for, or None for one device.

    Args:
      options: `coordinator` without `mesh` means `auto`.

    Raises:
      TrainingError: the mesh does not fit the devices or the rows.
    """
    given = options.mesh
    if given is None and jax.process_count() == 1:
        return None
    given = meshes.AUTO if given is None else given
    if given.strip() == meshes.AUTO:
        axes = meshes.choose_axes(jax.device_count(), options.batch)
    else:
        axes = meshes.parse_mesh(given)
    mesh = meshes.make_mesh(axes)
    meshes.check_rows(mesh, options.batch)
    return mesh


def describe(mesh: Mesh, config: Any) -> list[str]:
    """Return the mesh in words, and what of the model it cannot divide."""
    several = jax.process_count()
    of = f" in {several} processes" if several > 1 else ""
    lines = [f"mesh {meshes.describe(mesh.shape)}: {count(mesh.size, 'device')}{of}"]
    tensor = mesh.shape.get("tensor", 1)
    heads = {name: getattr(config, name, tensor) for name in _HEADS}
    undivided = [f"{n} {name.removeprefix('num_')}" for name, n in heads.items() if n % tensor]
    if undivided:
        what = " and ".join(undivided).replace("_", " ")
        lines.append(f"note: tensor={tensor} does not divide {what}: these weights are replicated")
    return lines


def place(model: Pretrained, mesh: Mesh | None) -> Pretrained:
    """Return a model whose parameters lie on a mesh, by the rules of `models.load`.

    Those that are there already stay as they are.
    """
    if mesh is None:
        return model
    where = sharding_rules.shardings(model.params, mesh, config=model.config)
    return dataclasses.replace(model, params=jax.tree.map(put, model.params, where))


def in_use(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which models constrain their activations to the mesh, if there is one."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
