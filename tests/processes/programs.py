"""What each of several processes runs in the tests beside this file: one function by its name."""

import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

import lora_jax as lora
from lora_jax.core.errors import OtherProcessError
from lora_jax.files.disk import processes
from lora_jax.models import pretrained, saving
from lora_jax.training.checkpoints import Checkpoints
from lora_jax.training.distributed.agreement import agreeing
from lora_jax.training.errors import TrainingError
from tests.processes.made import CONFIG, global_mesh, model_and_adapters, on_mesh


def save_everything(folder: pathlib.Path) -> None:
    """Save adapters and a model that span the processes, in every format, and load them again."""
    for scan in (False, True):
        place, mesh = folder / f"scan={scan}", global_mesh()
        model, adapters = model_and_adapters(scan)
        base, there = on_mesh(model.params, mesh), on_mesh(adapters, mesh)
        assert all(processes.span_processes(x) for x in jax.tree.leaves((base, there)))
        write(place, dataclasses.replace(model, params=base), there)
        check_loaded(place, model, base, adapters)


def write(folder: pathlib.Path, model: pretrained.Pretrained, adapters: object) -> None:
    """Write a file of each format."""
    base, naming = model.params, model.naming
    lora.save(folder / "native.safetensors", adapters, base=base, config=CONFIG)
    lora.peft.save(folder / "peft", adapters, naming, base=base)
    lora.mlx.save(folder / "mlx", adapters, naming, base=base)
    saving.save(folder / "model", model)


def check_loaded(
    folder: pathlib.Path, model: pretrained.Pretrained, base: object, adapters: object
) -> None:
    """Load adapters in every process: those that were saved, sharded as their weights are."""
    _, where = lora.split(lora.shardings(lora.join(base, adapters)))
    for found in (
        lora.load(folder / "native.safetensors", base),
        lora.peft.load(folder / "peft", base, model.naming),
        lora.mlx.load(folder / "mlx", base, model.naming),
    ):
        jax.tree.map(np.testing.assert_array_equal, processes.to_host(found), adapters)
        placed = lambda x, sharding: sharding.is_equivalent_to(x.sharding, x.ndim)
        assert all(jax.tree.leaves(jax.tree.map(placed, found, where)))


def fail_to_write(folder: pathlib.Path) -> None:
    """Save where a file stands in the way of process 0: all of them see it, none waits."""
    model, adapters = model_and_adapters()
    base, there = on_mesh(model.params, global_mesh()), on_mesh(adapters, global_mesh())
    obstacle = folder / "obstacle"
    obstacle.parent.mkdir(parents=True, exist_ok=True)
    obstacle.write_text("a file")
    for save in (
        lambda: lora.save(obstacle / "a.safetensors", there, base=base),
        lambda: lora.peft.save(obstacle / "peft", there, model.naming, base=base),
        lambda: lora.mlx.save(obstacle / "mlx", there, model.naming, base=base),
        lambda: saving.save(obstacle / "m", dataclasses.replace(model, params=base)),
    ):
        try:
            save()
        except OSError as error:
            assert jax.process_index() == 0 and "obstacle" in str(error.filename)
        except OtherProcessError as error:
            assert error.process == 0 and "obstacle" in error.reason, error
        else:
            raise AssertionError("no error")
    bad = dataclasses.replace(model, params={**base, "extra": {"kernel": base["embedding"]}})
    try:
        saving.save(folder / "bad", bad)
    except lora.LoraError as error:
        assert "no row of the naming has this path" in str(error)


def save_locally(folder: pathlib.Path) -> None:
    """Save in one process what lies on it alone: it waits for no other."""
    model, adapters = model_and_adapters()
    if jax.process_index() == 1:
        write(folder, model, adapters)


def checkpoint(folder: pathlib.Path) -> None:
    """Save a state with arrays on the mesh and in every process, and restore it on other meshes."""
    _, adapters = model_and_adapters()
    state = {"adapters": on_mesh(adapters, global_mesh()), "count": jnp.int32(7), "np": np.ones(3)}
    with Checkpoints(folder / "checkpoints") as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state | {"count": jnp.int32(step)})
    turned = jax.make_mesh((2, jax.device_count() // 2), ("fsdp", "tensor"), (AxisType.Auto,) * 2)
    for mesh in (global_mesh(), turned):
        like = state | {"adapters": on_mesh(adapters, mesh)}
        with Checkpoints(folder / "checkpoints") as checkpoints:
            assert checkpoints.steps() == [2, 3]
            done, found = checkpoints.restore(like)
        assert done == found["count"] == 3
        same = lambda x, y: np.testing.assert_array_equal(x, y)
        jax.tree.map(same, processes.to_host(found["adapters"]), adapters)
        where = jax.tree.map(
            lambda x, y: x.sharding == y.sharding, found["adapters"], like["adapters"]
        )
        assert all(jax.tree.leaves(where)) and found["count"].sharding == state["count"].sharding


def refuse_checkpoint(folder: pathlib.Path) -> None:
    """Save where a checkpoint does not fit on the disk of one process."""
    state = {"x": on_mesh(np.ones((8, 8), np.float32), global_mesh())}
    with Checkpoints(folder / "checkpoints") as checkpoints:
        if jax.process_index() == 1:
            checkpoints.directory = folder / "not there"
        try:
            checkpoints.save(1, state)
        except OtherProcessError as error:
            assert error.process == 1 and "cannot write a checkpoint of" in error.reason
        except TrainingError as error:
            assert jax.process_index() == 1 and "cannot write a checkpoint of" in str(error)
        else:
            raise AssertionError("no error")
        assert checkpoints.steps() == []


def agree(folder: pathlib.Path) -> None:
    """Stop at the same call in all processes, whoever asks; and fail together."""
    number = jax.process_index()
    for asks in range(jax.process_count()):
        wants = iter([False, False, False, *[number == asks] * 9])
        with agreeing(lambda wants=wants: next(wants)) as (stop, _):
            calls = next(n for n in range(12) if stop())
        told = processes.tell_all(str(calls))
        assert len(set(told)) == 1 and 3 <= calls < 8, told
    for fails in range(jax.process_count()):
        try:
            with agreeing(lambda: False) as (stop, fail):
                for calls in range(100):
                    if calls == 3 and number == fails:
                        fail(OSError(28, "No space left on device", "log.jsonl"))
                    stop()
        except OtherProcessError as error:
            assert number != fails and error.process == fails, error
            assert error.reason == "log.jsonl: No space left on device", error
        except OSError:
            assert number == fails
        told = processes.tell_all(str(calls))
        assert len(set(told)) == 1 and 3 <= calls < 8, told


def fail_at_the_end(folder: pathlib.Path) -> None:
    """Fail after the last question: all fail when the block ends."""
    try:
        with agreeing(lambda: False) as (stop, fail):
            assert not stop()
            if jax.process_index() == 1:
                fail(OSError(28, "No space left on device", "log.jsonl"))
    except OtherProcessError:
        assert jax.process_index() == 0
    except OSError:
        assert jax.process_index() == 1
    else:
        raise AssertionError("no error")


if __name__ == "__main__":
    name, folder, coordinator, number, count = sys.argv[1:]
    jax.distributed.initialize(
        coordinator, int(count), int(number), initialization_timeout=60, shutdown_timeout_seconds=30
    )
    globals()[name](pathlib.Path(folder))
