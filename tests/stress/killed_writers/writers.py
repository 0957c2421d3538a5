"""What a process does until it is killed: save one version after another, or train.

Nothing here runs JAX when it is imported: the server that forks the processes imports it once.
"""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

import lora_jax
from lora_jax import diffusion, gguf, orbax, peft
from lora_jax.core.layout import Layout
from lora_jax.core.weights import LoraWeight
from lora_jax.files.naming import Entry, Naming
from lora_jax.training import log
from lora_jax.training.checkpoints import Checkpoints
from lora_jax.training.loop import train
from lora_jax.training.reporting import reporters
from tests.training import tiny_model

SHAPE, RANK = (400, 300), 128  # 360 kB: writing takes a while
NAMING = Naming((Entry("up.weight", "up/kernel", "linear"),))


def base() -> Any:
    return {"up": {"kernel": jax.ShapeDtypeStruct(SHAPE, jnp.float32)}}


def scale(version: int) -> float:
    """Return the same for two versions in a row: sometimes only one file of a set changes."""
    return 2.0 ** (version // 2 % 7)


def adapters(version: int) -> Any:
    """Return adapters whose values of A and B are all the version."""
    a, b = (np.full(s, version, np.float32) for s in ((SHAPE[0], RANK), (RANK, SHAPE[1])))
    node = LoraWeight(None, a, b, np.float32(scale(version)), layout=Layout("io"))
    return {"up": {"kernel": node}}


def version_of(found: Any) -> int:
    """Return the version of adapters that have a single one.

    Raises:
      AssertionError: they are not.
    """
    node = found["up"]["kernel"]
    versions = {float(x) for leaf in (node.a, node.b) for x in np.unique(np.asarray(leaf))}
    assert len(versions) == 1, f"torn: values of versions {versions}"
    (version,) = versions
    assert float(node.scale) == scale(int(version)), f"torn: the scale of another than {version}"
    return int(version)


# Each kind: how a version is saved, how the newest is read.


def save_native(folder: Path, version: int) -> None:
    lora_jax.save(folder / "adapter.safetensors", adapters(version))


def read_native(folder: Path) -> int:
    return version_of(lora_jax.load(folder / "adapter.safetensors", base()))


def save_peft(folder: Path, version: int) -> None:
    peft.save(folder / "adapter", adapters(version), NAMING, base=base())


def read_peft(folder: Path) -> int:
    _foreign_peft(folder / "adapter")
    return version_of(peft.load(folder / "adapter", base(), NAMING))


def _foreign_peft(folder: Path) -> None:
    """Check what peft would see if there is a configuration: files of one version."""
    if (folder / peft.CONFIG).exists():
        config = json.loads((folder / peft.CONFIG).read_bytes())
        tensors = load_file(folder / peft.TENSORS)
        versions = {float(x) for tensor in tensors.values() for x in np.unique(tensor)}
        assert len(versions) == 1, f"torn: values of versions {versions}"
        (version,) = versions
        assert config["lora_alpha"] / config["r"] == scale(int(version)), "torn: two versions"


def save_card(folder: Path, version: int) -> None:
    card = peft.ModelCard(figures={"version": version})
    peft.save(folder / "adapter", adapters(version), NAMING, base=base(), card=card)


def read_card(folder: Path) -> int:
    version = read_peft(folder)
    directory = folder / "adapter"
    if (directory / peft.CONFIG).exists():  # else the set is read from where it was staged
        tensors = load_file(directory / peft.TENSORS)
        assert {float(x) for x in np.unique(tensors[min(tensors)])} == {version}
        assert f"| version | {version} |" in (directory / peft.CARD).read_text(), "torn: the card"
    return version


NAMES = gguf.Names("llama", Naming((Entry("blk.0.ffn_up.weight", "up/kernel", "linear"),)))


def save_gguf(folder: Path, version: int) -> None:
    gguf.save(folder / "adapter.gguf", adapters(version), NAMES, base=base())


def read_gguf(folder: Path) -> int:
    return version_of(gguf.load(folder / "adapter.gguf", base(), NAMES))


IN_UNET = Naming((Entry("unet.up.weight", "up/kernel", "linear"),))


def save_images(folder: Path, version: int) -> None:
    diffusion.save(folder / "lora.safetensors", adapters(version), IN_UNET, base=base())


def read_images(folder: Path) -> int:
    return version_of(diffusion.load(folder / "lora.safetensors", base(), IN_UNET))


def save_orbax(folder: Path, version: int) -> None:
    """Write a directory per version, as a trainer has one per step, and keep the last two."""
    steps = folder / "steps"
    shutil.rmtree(steps / str(version - 2), ignore_errors=True)
    orbax.save(steps / str(version), adapters(version), "tunix", alpha=RANK)


def read_orbax(folder: Path) -> int:
    shapes = {"up": {"kernel": np.zeros(SHAPE, np.float32)}}
    found = orbax.load(folder / "steps", "tunix", base=shapes, alpha=RANK)
    (version,) = {float(x) for x in np.unique(np.asarray(found["up"]["kernel"].a))}
    return int(version)


def save_report(folder: Path, version: int) -> None:
    """Write a step as a run does that was resumed before it."""
    reporter = reporters.KINDS["jsonl"].open(folder, {}, version - 1)
    reporter.report(version, {"train/loss": 1.0})
    reporter.close()


def read_report(folder: Path) -> int:
    steps = [record["step"] for record in log.read(folder / "metrics.jsonl")]
    assert steps == list(range(len(steps))), f"torn: steps {steps}"
    return len(steps) - 1


def state(version: int) -> Any:
    node = adapters(version)
    return {"adapters": node, "opt": jax.tree.map(np.array, node), "step": np.int32(version)}


def save_state(folder: Path, version: int) -> None:
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(version, jax.tree.map(jnp.asarray, state(version)))


def read_state(folder: Path) -> int:
    with Checkpoints(folder / "checkpoints") as checkpoints:
        found = checkpoints.restore(jax.tree.map(jnp.asarray, state(0)))
    assert found is not None, "no checkpoint is left"
    version, tree = found
    versions = {version, version_of(tree["adapters"]), version_of(tree["opt"]), int(tree["step"])}
    assert len(versions) == 1, f"torn: versions {versions}"
    return version


KINDS: dict[str, tuple[Callable[[Path, int], None], Callable[[Path], int]]] = {
    "native file": (save_native, read_native),
    "PEFT directory": (save_peft, read_peft),
    "PEFT directory with a card": (save_card, read_card),
    "GGUF adapter": (save_gguf, read_gguf),
    "LoRA of images": (save_images, read_images),
    "Orbax checkpoint": (save_orbax, read_orbax),
    "report": (save_report, read_report),
    "training state": (save_state, read_state),
}


def save_forever(kind: str, folder: Path, done: Any) -> None:
    """Save version after version; `done.value` is the last finished one."""
    save, _ = KINDS[kind]
    for version in itertools.count(done.value + 1):
        save(folder, version)
        done.value = version


STEPS = 60


def train_on(folder: Path, done: Any) -> None:
    """Run the loop, from its last checkpoint if there is one."""
    jax.config.update("jax_compilation_cache_dir", str(folder.parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    job, start = tiny_model.job(folder, steps=STEPS, save_every=2, eval_every=10)
    train(job, start)
    done.value = 1
