"""`combine`: files of every kind in, the sum of their updates out."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import lora_jax
from lora_jax import peft
from lora_jax.core.tree import adapted_nodes
from lora_jax.files.contained_factors import read_factors
from tests.adapters.algebra import random_overlays
from tests.cli import files
from tests.parity.peft import models as reference

pytestmark = pytest.mark.usefixtures("quick_compile")
COMBINED = np.load(Path(reference.__file__).parent / "recorded" / "combined.npz")
SOME, OTHERS, MLX = Path("some"), Path("others"), Path("mlx")
MODULE = files.MODULES[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    files.peft(folder / SOME, seed=0)
    files.peft(folder / OTHERS, seed=1, config={"use_rslora": True})
    files.mlx(folder / MLX, seed=2)
    files.native(folder / "own.safetensors")
    files.model(folder / "my-model")
    _write_misfits(folder)
    return folder


def _write_misfits(folder):
    """Write adapters that cannot be combined, or not with the others."""
    zeros = lambda *shape: np.ones(shape, "f4")
    start = f"base_model.model.{MODULE}.lora_"
    files.peft(
        folder / "dora",
        config={"use_dora": True},
        extra={f"base_model.model.{m}.lora_magnitude_vector": zeros(8) for m in files.MODULES},
    )
    narrow = {f"{start}A.weight": zeros(2, 12), f"{start}B.weight": zeros(8, 2)}
    files.peft(folder / "narrow", extra=narrow, config={"rank_pattern": {MODULE: 2}})
    wide = {f"{start}A.weight": zeros(4, 13)}
    files.peft(folder / "wide", extra=wide)
    files.peft(folder / "pissa", config={"init_lora_weights": "pissa"})


@pytest.fixture(autouse=True)
def inside(world, monkeypatch):
    monkeypatch.chdir(world)


def combine(run, out, *words):
    done = run("combine", *words, "--out", out, "--force")
    assert (done.status, done.err) == (0, ""), done
    return done.out, files.updates(Path(out))


def total(**weights):
    found = dict.fromkeys(files.MODULES, 0)
    for name, weight in weights.items():
        for module, update in files.updates(Path(name)).items():
            found[module] = found[module] + weight * update
    return found


def close(got, want, atol=1e-5):
    assert got.keys() == want.keys()
    for module, update in want.items():
        np.testing.assert_allclose(got[module], update, atol=atol, err_msg=module)


def test_the_weighted_sum_of_files_of_two_formats(run):
    out, got = combine(run, "sum", SOME, OTHERS, MLX, "--weights", "0.5,-2,1")
    close(got, total(some=0.5, others=-2, mlx=1))
    assert out == "wrote sum: PEFT adapter, cat of 3 adapters, 4 weights of rank 12\n"
    config = json.loads(Path("sum/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (12, 12, False)
    assert config["base_model_name_or_path"] == "tiny"


@pytest.mark.parametrize("to", ["folded", "mlx"])
def test_other_formats(to, run):
    _, got = combine(run, to, SOME, OTHERS, "-w", "-1,1", "--to", to)
    close(got, total(some=-1, others=1))
    assert read_factors(Path(to)).kind == ("mlx" if to == "mlx" else "peft")


def test_a_smaller_rank_is_the_best_of_it(run):
    out, got = combine(run, "small", SOME, "--rank", 2)
    assert "svd of one adapter, 4 weights of rank 2" in out
    for module, update in files.updates(SOME).items():
        u, s, vt = np.linalg.svd(update, full_matrices=False)
        np.testing.assert_allclose(got[module], (u[:, :2] * s[:2]) @ vt[:2], atol=1e-4)


def test_energy(run):
    out, got = combine(run, "enough", SOME, "--energy", 0.9)
    shares = {}
    for module, update in files.updates(SOME).items():
        shares[module] = 1 - np.sum((update - got[module]) ** 2) / np.sum(update**2)
    worst = min(shares, key=shares.get)
    assert shares[worst] >= 0.9 and np.linalg.matrix_rank(got[worst]) < 4
    assert out.endswith(f"at least {shares[worst]:.2%} ({worst}.weight)\n")


@pytest.mark.slow
def test_ties_and_dare_run(run):
    words = [SOME, OTHERS, "--method", "dare_ties", "--density", 0.5]
    out, _ = combine(run, "made", *words)
    assert "dare_ties of 2 adapters, 4 weights of rank 4" in out
    _, again = combine(run, "again", *words)
    close(again, files.updates(Path("made")), atol=0)


def test_files_of_lora_jax_need_no_base(run):
    own = "own.safetensors"
    out, got = combine(run, "twice.safetensors", own, own, "--weights", "1,1")
    close(got, {module: 2 * update for module, update in files.updates(Path(own)).items()})
    assert "lora_jax adapter, cat of 2 adapters" in out


def test_files_of_lora_jax_keep_what_they_say_and_must_agree(run, fails):
    tree, rng = {"w": np.ones((4, 3), "f4")}, np.random.default_rng(0)
    node = random_overlays.random_node(rng, "io", (4, 3), 2)
    said = {"labels": ["no", "yes"], "model": "tiny"}
    lora_jax.save("a.safetensors", {"w": node}, said, base=tree)
    lora_jax.save("b.safetensors", {"w": node}, said | {"labels": ["a", "b"]}, base=tree)
    lora_jax.save("c.safetensors", {"w": node}, said, base={"w": tree["w"] + 1})
    combine(run, "d.safetensors", "a.safetensors", "a.safetensors")
    assert lora_jax.read_metadata("d.safetensors")["metadata"] == said
    got = lora_jax.load("d.safetensors", tree)["w"]
    one, both = (random_overlays.update(x) for x in (node, got))
    np.testing.assert_allclose(both, 2 * one, rtol=1e-5)
    told = fails("combine", "a.safetensors", "b.safetensors", "--out", "x")
    assert "b.safetensors: has the labels ['a', 'b'], and a.safetensors ['no', 'yes']" in told
    told = fails("combine", "a.safetensors", "c.safetensors", "--out", "x")
    assert "c.safetensors: was trained on another base than a.safetensors: w: other values" in told


@pytest.mark.slow
def test_a_mixture_with_its_model(run):
    words = ["convert", SOME, "--to", "native", "--out", "a.safetensors", "--force"]
    assert run(*words, "--model", "my-model").status == 0
    model = ["--model", "my-model"]
    _, got = combine(run, "mixed", OTHERS, "a.safetensors", "--weights", "1,-1", *model)
    close(got, total(others=1, some=-1))
    _, got = combine(run, "mixed.safetensors", "a.safetensors", OTHERS, *model)
    assert len(got) == 4


def test_files_that_say_differently_which_modules_are_transposed(run):
    """PEFT writes fan_in_fan_out for all modules where one is a Conv1D; its numbers are wanted."""
    names = ("all", "rslora", "patterns")
    for place in (*(f"adapters/{name}" for name in names), "cases/cat"):
        folder = Path("recorded") / place
        folder.mkdir(parents=True, exist_ok=True)
        for file in (peft.CONFIG, peft.TENSORS):
            (folder / file).write_bytes(COMBINED[f"{place}/{file}"].tobytes())
    adapters = [Path("recorded/adapters") / name for name in names]
    done = run("combine", *adapters, "-w", "0.7,-1.2,0.4", "--out", "three", "--force")
    assert done.status == 0, done
    got, want = (
        adapted_nodes(peft.load(folder, reference.shapes("plain"), reference.PLAIN))
        for folder in ("three", "recorded/cases/cat")
    )
    assert got.keys() == want.keys()
    for path, node in want.items():
        zeros = np.zeros(node.shape)
        wanted, found = reference.meaning(node, zeros), reference.meaning(got[path], zeros)
        np.testing.assert_allclose(found, wanted, atol=2e-5, err_msg=path)


@pytest.mark.slow
def test_dora_with_its_model(run):
    rng = np.random.default_rng(0)
    name = "base_model.model.{}.lora_magnitude_vector"
    extra = {name.format(m): rng.uniform(1, 2, 8).astype("f4") for m in files.MODULES}
    files.peft(Path("with-magnitudes"), extra=extra, config={"use_dora": True})
    words = ["with-magnitudes", "--method", "svd", "--rank", 8, "--model", "my-model"]
    _, got = combine(run, "plain", *words)
    for module, update in files.updates(SOME).items():
        w = files.weights()[f"{module}.weight"].T.astype(np.float64)
        total = w + update
        gain = extra[name.format(module)] / np.linalg.norm(total, axis=0)
        np.testing.assert_allclose(got[module], gain * total - w, atol=1e-4)


def test_other_bases_are_told(run):
    files.peft(Path("far"), config={"base_model_name_or_path": "other"})
    done = run("combine", SOME, "far", "--out", "both", "--force")
    assert done.status == 0 and done.err == (
        "warning: the adapters name different bases: tiny, other; the result names tiny\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([SOME, OTHERS, "-w", "1"], "--weights 1: must be one number per adapter, .* here 2"),
        ([SOME, "-w", "one"], "--weights one: must be one number per adapter"),
        ([SOME, "--method", "sum"], "--method sum: must be one of cat, linear, svd, ties"),
        ([SOME, "--method", "ties"], "--method ties needs --density, the share of elements"),
        ([SOME, "--density", "0.5"], "--density: cat keeps all elements; leave it out"),
        ([SOME, "--method", "linear", "--rank", 2], "--rank: linear has no rank to choose"),
        ([SOME, "--method", "ties", "--density", 2], "from 0 to 1, got 2.0"),
        ([SOME, "--energy", 2], "--energy must be above 0 and at most 1, got 2.0"),
        ([SOME, "own.safetensors"], "paths of a JAX tree, .* give the base with --model"),
        ([SOME, "--to", "native"], "from PEFT adapter to native: .* the base with --model"),
        (["own.safetensors", "--to", "peft"], "from lora_jax adapter to peft: .* with --model"),
        ([SOME, "--naming", "n.json"], "--naming is only for lora_jax adapters"),
        (["dora", SOME], "DoRA.*method that ends in .svd., and give the base with --model"),
        (["narrow", SOME, "--method", "linear"], "q_proj.weight: ranks 2, 4, and the method adds"),
        (["wide", SOME], "q_proj.weight has the shape .8, 12., and .8, 13. in wide"),
        (["pissa"], "PiSSA changed the base .* --model, or --residual"),
        (["nothing"], "nothing: no such file or directory"),
    ],
)
def test_what_is_wrong(words, message, world, fails):
    told = fails("combine", *words, "--out", "x")
    assert re.search(message, told), told
    assert not (world / "x").exists()
