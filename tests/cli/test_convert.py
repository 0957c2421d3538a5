"""`convert`: each module's update is the same in every kind of file."""

import json

import jax
import numpy as np
import pytest

import lora_jax
from lora_jax import models
from lora_jax.files.contained_factors import read_factors
from lora_jax.files.disk import safetensors_file
from tests.cli import files

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def world(tmp_path, monkeypatch):
    files.everything(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_same(path, wanted=None):
    got = files.updates(path)
    wanted = wanted or {
        module: files.ALPHA / files.RANK * a.astype(np.float64) @ b
        for module, (a, b) in files.factors().items()
    }
    assert got.keys() == wanted.keys()
    for module, update in wanted.items():
        np.testing.assert_allclose(got[module], update, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("adapter", "to"),
    [("my-adapter", "folded"), ("my-adapter", "mlx"), ("my-mlx-adapter", "peft")]
    + [("my-mlx-adapter", "folded"), ("adapter.safetensors", "peft")]
    + [("adapter.safetensors", "mlx"), ("adapter.safetensors", "folded")],
)
def test_without_the_base(adapter, to, world, run):
    own = ["--naming", "naming.json"] if adapter.endswith(".safetensors") else []
    done = run("convert", adapter, "--to", to, "--out", "made", *own)
    assert (done.status, done.err) == (0, "") and done.out.startswith("wrote made: ")
    assert_same(world / "made")
    file = read_factors(world / "made")
    assert file.kind == ("mlx" if to == "mlx" else "peft") and file.base == "tiny"
    if to == "folded":
        assert {one.scale for one in file.factors} == {1.0}


@pytest.mark.parametrize("adapter", ["my-adapter", "my-mlx-adapter"])
def test_to_a_file_of_lora_jax_and_back(adapter, world, run):
    model = ["--model", "my-model"]
    assert run("convert", adapter, "--to", "native", "--out", "a.safetensors", *model).status == 0
    pretrained = models.load("my-model")
    adapters = lora_jax.load("a.safetensors", pretrained.params)
    assert lora_jax.count_params(adapters).trainable == 4 * (files.WIDTH + files.OUT) * files.RANK
    assert lora_jax.read_metadata("a.safetensors")["metadata"] == {"model": "tiny"}
    assert run("convert", "a.safetensors", "--to", "peft", "--out", "back", *model).status == 0
    assert_same(world / "back")


def test_ranks_and_scales_that_differ_are_folded(world, run):
    narrow = {f"base_model.model.{files.MODULES[0]}.lora_A.weight": np.ones((2, 12), np.float32)}
    narrow |= {f"base_model.model.{files.MODULES[0]}.lora_B.weight": np.ones((8, 2), np.float32)}
    name = "layers.0.self_attn.q_proj"
    config = {"rank_pattern": {name: 2}, "alpha_pattern": {name: 3}, "task_type": "CAUSAL_LM"}
    wanted = files.updates(files.peft(world / "mixed", config=config, extra=narrow))
    for to in ("folded", "mlx"):
        assert run("convert", "mixed", "--to", to, "--out", to).status == 0
        assert_same(world / to, wanted)
        assert {one.a.shape[1] for one in read_factors(world / to).factors} == {4}
    written = json.loads((world / "folded" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (4, 4)
    assert written["rank_pattern"] == written["alpha_pattern"] == {}
    assert written["task_type"] == "CAUSAL_LM"
    written = json.loads((world / "mlx" / "adapter_config.json").read_text())
    assert written["lora_parameters"]["keys"] == ["self_attn.q_proj", "self_attn.v_proj"]


def test_narrow_factors_with_a_large_scale(world, run):
    """float16 ends at 65,504: the scale is shared between the factors, and the update stays."""
    rng, (name, *_) = np.random.default_rng(0), files.MODULES
    a, b = (rng.uniform(0.1, 1, shape).astype(np.float16) for shape in ((4, 12), (8, 4)))
    extra = {f"base_model.model.{name}.lora_A.weight": a}
    extra |= {f"base_model.model.{name}.lora_B.weight": b * np.float16(3e4)}
    config = {"alpha_pattern": {name: 1e3}}
    wanted = files.updates(files.peft(world / "narrow", config=config, extra=extra))
    for to in ("folded", "mlx"):
        assert run("convert", "narrow", "--to", to, "--out", to).status == 0
        got = files.updates(world / to)
        for module, update in wanted.items():
            np.testing.assert_allclose(got[module], update, rtol=0, atol=1e-3 * abs(update).max())


def test_every_name_of_an_mlx_file_is_kept_apart(world, run):
    """Only the second layer is adapted: PEFT must not put an adapter on the first."""
    path = world / "my-mlx-adapter" / "adapters.safetensors"
    tensors, _ = safetensors_file.read(path)
    safetensors_file.write(path, {k: x for k, x in tensors.items() if ".1." in k})
    assert run("convert", "my-mlx-adapter", "--to", "peft", "--out", "made").status == 0
    config = json.loads((world / "made" / "adapter_config.json").read_text())
    assert config["target_modules"] == [m for m in files.MODULES if ".1." in m]


def test_a_file_saved_without_its_base_names_every_module_in_full(world, run):
    tree = {"layers": {"1": {"up": {"kernel": np.ones((3, 4), np.float32)}}}}
    params = lora_jax.init(jax.random.key(0), tree, lora_jax.LoraConfig(rank=2))
    lora_jax.save("one.safetensors", lora_jax.split(params)[1])
    row = {"torch": "{*m}.weight", "path": "{*m}/kernel", "kind": "linear"}
    (world / "names.json").write_text(json.dumps([row]))
    words = ["convert", "one.safetensors", "--naming", "names.json"]
    for to in ("peft", "folded"):
        assert run(*words, "--to", to, "--out", to).status == 0
        config = json.loads((world / to / "adapter_config.json").read_text())
        assert config["target_modules"] == ["layers.1.up"]
    assert run("convert", "peft", "--to", "folded", "--out", "again").status == 0
    config = json.loads((world / "again" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["layers.1.up"]


def test_files_of_peft_itself(tmp_path, run, fails):
    """Files of peft 0.21.2 (tests/parity/peft/recorded/record_files.py), without their base."""
    recorded = np.load("tests/parity/peft/recorded/files.npz")
    can = {"linear", "patterns", "rslora", "some layers", "regex", "all-linear", "embedding"}
    can |= {"conv1d", "convolutions", "one module"}
    names = {key.split("/")[0] for key in recorded if key.endswith("adapter_config.json")}
    assert len(can & names) > 7
    for name in sorted(can & names):
        directory = tmp_path / name
        directory.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (directory / file).write_bytes(recorded[f"{name}/{file}"].tobytes())
        done = run("convert", directory, "--to", "folded", "--out", tmp_path / f"{name} folded")
        assert done.status == 0, done
        assert_same(tmp_path / f"{name} folded", files.updates(directory))
    directory = tmp_path / "bias all"
    directory.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (directory / file).write_bytes(recorded[f"bias all/{file}"].tobytes())
    assert "is fully trained" in fails("convert", directory, "--to", "folded", "--out", "x")


def test_a_prefix_is_removed_from_the_names(world, run, fails):
    adapter = world / "my-adapter" / "adapter_model.safetensors"
    tensors, metadata = safetensors_file.read(adapter)
    start, more = "base_model.model.model.", "base_model.model.model.language_model."
    wrong = {name.replace(start, more): x for name, x in tensors.items()}
    safetensors_file.write(adapter, wrong, metadata)
    told = fails("convert", "my-adapter", "--to", "native", "--model", "my-model", "--out", "a")
    assert "8 names, such as " in told in told
    rule = "language_model="
    assert f"on the command line --rename {rule} (for train" in told
    merge = ["merge", "--model", "my-model", "--adapter", "my-adapter", "--out"]
    assert f"--rename {rule}" in fails(*merge, "no")
    assert run(*merge, "renamed", "--rename", rule).status == 0
    for to in ("peft", "folded", "mlx"):
        words = ["--to", to, "--out", to, "--rename", rule]
        assert run("convert", "my-adapter", *words).status == 0
        assert_same(world / to)
    assert_same(world / "peft")
    words = ["--to", "native", "--out", "a.safetensors", "--model", "my-model", "--rename", rule]
    assert run("convert", "my-adapter", *words).status == 0
    assert run("merge", "--model", "my-model", "--adapter", "peft", "--out", "m").status == 0
    for made in ("renamed", "m"):
        merged, _ = safetensors_file.read(world / made / "model.safetensors")
        for module, update in files.updates(world / "peft").items():
            want = files.weights()[f"{module}.weight"] + update.T
            np.testing.assert_allclose(merged[f"{module}.weight"], want, atol=1e-6)
    words = ["convert", "my-adapter", "--to", "mlx", "--out", "x", "--rename"]
    assert "is in no name of the file" in fails(*words, "bert=")
    assert "must be OLD=NEW" in fails(*words, "bert")
    own = ["convert", "adapter.safetensors", "--naming", "naming.json", "--to", "peft"]
    assert "PyTorch's names" in fails(*own, "--out", "x", "--rename", "a=b")


def test_a_prefix_in_an_mlx_file(world, run):
    path = world / "my-mlx-adapter" / "adapters.safetensors"
    tensors, metadata = safetensors_file.read(path)
    safetensors_file.write(path, {f"language_model.{k}": x for k, x in tensors.items()}, metadata)
    words = ["--to", "mlx", "--out", "made", "--rename", "language_model="]
    assert run("convert", "my-mlx-adapter", *words).status == 0
    assert_same(world / "made")


@pytest.mark.filterwarnings("default")
def test_what_does_not_fit_is_left_out_with_a_warning(world, run, fails):
    adapter = world / "my-adapter" / "adapter_model.safetensors"
    tensors, metadata = safetensors_file.read(adapter)
    del tensors[f"base_model.model.{files.MODULES[0]}.lora_B.weight"]
    tensors["other.weight"] = np.ones((2, 2), np.float32)
    safetensors_file.write(adapter, tensors, metadata)
    wanted = {
        module: files.ALPHA / files.RANK * a.astype(np.float64) @ b
        for module, (a, b) in files.factors().items()
        if module != files.MODULES[0]
    }
    assert "lora_B" in fails("convert", "my-adapter", "--to", "folded", "--out", "folded")
    model = ["--model", "my-model"]
    for to, more in (("folded", []), ("mlx", []), ("native", model)):
        done = run("convert", "my-adapter", "--to", to, "--out", to, "--no-strict", *more)
        assert done.status == 0 and done.err.startswith("warning: ")
        assert f"{files.MODULES[0]}.lora_" in done.err and "other.weight" in done.err
    for to in ("folded", "mlx"):
        assert_same(world / to, wanted)


@pytest.fixture
def pissa(world):
    """An adapter that was saved on PiSSA's residual, and the updates that it means."""
    adapter, weights = files.peft(world / "pissa", config={"init_lora_weights": "pissa"}), {}
    for module, update in files.updates(adapter).items():
        weight = files.weights()[f"{module}.weight"].astype(np.float64)
        u, s, vt = np.linalg.svd(weight)
        weights[module] = update - ((u[:, :4] * s[:4]) @ vt[:4]).T
    return weights


def test_an_adapter_of_pissas_residual(pissa, world, run, fails):
    model = ["--model", "my-model"]
    for to in ("peft", "folded", "mlx"):
        assert run("convert", "pissa", "--to", to, "--out", to, *model).status == 0
        assert_same(world / to, pissa)
    assert run("convert", "pissa", "--to", "native", "--out", "a.safetensors", *model).status == 0
    assert read_factors(world / "peft").variant == "LoRA"
    for words in (["--adapter", "pissa"], ["--adapter", "mlx"], ["--adapter", "a.safetensors"]):
        assert run("merge", *model, *words, "--out", "merged", "--force").status == 0
        merged, _ = safetensors_file.read(world / "merged" / "model.safetensors")
        for module, update in pissa.items():
            want = files.weights()[f"{module}.weight"] + update.T
            np.testing.assert_allclose(merged[f"{module}.weight"], want, atol=1e-5)
    told = fails("convert", "pissa", "--to", "mlx", "--out", "x")
    assert "PiSSA changed the base" in told and "--model" in told
    assert run("convert", "pissa", "--to", "peft", "--out", "kept", "--residual").status == 0
    assert_same(world / "kept", files.updates(world / "pissa"))
    assert read_factors(world / "kept").variant == "LoRA"
    merge = ["merge", *model, "--out", "left", "--residual", "--adapter"]
    assert run(*merge, "pissa").status == 0  # the base here stands for what PiSSA left
    merged, _ = safetensors_file.read(world / "left" / "model.safetensors")
    for module, update in files.updates(world / "pissa").items():
        want = files.weights()[f"{module}.weight"] + update.T
        np.testing.assert_allclose(merged[f"{module}.weight"], want, atol=1e-6)
    for other in ("mlx", "a.safetensors"):
        assert "--residual is for adapters of PEFT" in fails(*merge, other, "--force")


def test_a_randomized_initialization_cannot_be_undone(world, run, fails):
    files.peft(world / "adapter", config={"init_lora_weights": "pissa_niter_16"})
    words = ["convert", "adapter", "--model", "my-model", "--out", "x", "--to"]
    for to in ("peft", "folded", "mlx", "native"):
        assert "cannot be recomputed" in fails(*words, to)
    merge = ["merge", "--model", "my-model", "--adapter", "adapter", "--out", "x"]
    assert "--residual on the command line" in fails(*merge)
    words = ["convert", "adapter", "--out", "kept", "--to", "peft", "--residual"]
    assert run(*words).status == 0
    merge = ["merge", "--model", "my-model", "--adapter", "kept", "--out", "m"]
    assert run(*merge).status == 0


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_of_gpt2(dora, world, run):
    """Conv1D keeps its weight as [in, out], but A and B as a linear layer does."""
    config = {"fan_in_fan_out": True, "use_dora": dora}
    name, extra = "base_model.model.{}.lora_magnitude_vector", {}
    if dora:
        extra = {name.format(m): np.full(files.OUT, 1.5, np.float32) for m in files.MODULES}
    files.peft(world / "gpt2", config=config, extra=extra)
    assert run("convert", "gpt2", "--to", "mlx", "--out", "mlx").status == 0
    assert_same(world / "mlx")
    tensors, _ = safetensors_file.read(world / "mlx" / "adapters.safetensors")
    assert ({f"{m}.m" for m in files.MODULES} <= tensors.keys()) == dora


def test_to_gguf_and_back(world, run, fails):
    model = ["--model", "my-model"]
    assert run("convert", "my-adapter", "--to", "gguf", "--out", "a.gguf", *model).status == 0
    file = read_factors(world / "a.gguf")
    assert (file.kind, file.base, file.targets) == ("gguf_adapter", "tiny", ["attn_q", "attn_v"])
    assert json.loads(run("inspect", "a.gguf", "--json").out)["description"] == "GGUF adapter"
    done = run("convert", "a.gguf", "--to", "peft", "--out", "back", *model)
    assert (done.status, done.err) == (0, "")
    assert_same(world / "back")
    words = ["convert", "a.gguf", "--out", "b", "--to"]
    assert "is already a GGUF adapter" in fails(*words, "gguf", *model)
    assert "GGUF has llama.cpp's names" in fails(*words, "peft")
    assert "--rename is for adapters with PyTorch's names" in fails(
        *words, "peft", "--rename", "a=b", *model
    )
    assert "a.gguf: a GGUF adapter, not a model" in fails(
        "convert", "my-adapter", "--to", "native", "--out", "b", "--model", "a.gguf"
    )
    done = run("combine", "a.gguf", "my-adapter", "--out", "sum.gguf", *model)
    assert (done.status, done.err) == (0, "") and len(read_factors(world / "sum.gguf").factors) == 4


def test_a_trainers_checkpoint(world, run, fails):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(12, 2)).astype("f4"), rng.normal(size=(2, 2, 4)).astype("f4")
    query = {"w": np.zeros((12, 2, 4), "f4"), "w_lora_a": a, "w_lora_b": b}
    tree = {"layers": {"0": {"attn": {"q_proj": query}}}}
    params = lora_jax.orbax.from_tree(tree, "tunix", alpha=3)
    lora_jax.orbax.save(world / "steps" / "5" / "model_params", params, "tunix", alpha=3)
    words = ["convert", "steps", "--to", "peft", "--out", "made", "--trainer", "tunix"]
    done = run(*words, "--alpha", 3)
    assert (done.status, done.err) == (0, "") and done.out == "wrote made: PEFT adapter\n"
    (update,) = files.updates(world / "made").values()
    np.testing.assert_allclose(update, 1.5 * a @ b.reshape(2, 8), rtol=1e-5)
    assert "exists already" in fails(*words, "--alpha", 3)
    words[4:6] = "--out", "other"
    assert "checkpoints do not hold alpha: pass" in fails(*words)
    assert "leave out --model" in fails(*words, "--alpha", 3, "--model", "my-model")
    assert "--to gguf: a checkpoint becomes" in fails(*words, "--alpha", 3, "--to", "gguf")
    assert "--alpha is for the checkpoint of a --trainer" in fails(*words[:-2], "--alpha", 3)
    assert "an Orbax checkpoint; read it with" in fails("inspect", "steps/5/model_params")


def test_failures(world, fails):
    words = ["convert", "my-adapter", "--out", "made", "--to"]
    own = ["convert", "adapter.safetensors", "--out", "made", "--to", "peft"]
    assert "give the base with --model" in fails(*words, "native")
    assert "is already a PEFT adapter" in fails(*words, "peft")
    assert "'gptq' is not one of" in fails(*words, "gptq", status=2)
    assert "GGUF has llama.cpp's names" in fails(*words, "gguf")
    assert "Missing option '--to'" in fails("convert", "my-adapter", "--out", "x", status=2)
    assert "give --model, or --naming" in fails(*own)
    both = ["--model", "my-model", "--naming", "naming.json"]
    assert "not both" in fails(*own, *both)
    assert "others have PyTorch's names" in fails(*words, "folded", "--naming", "naming.json")
    assert "none.json: no such file" in fails(*own, "--naming", "none.json")
    (world / "bad.json").write_text('[{"torch": "x"}]')
    assert "row 0 of the naming" in fails(*own, "--naming", "bad.json")
    (world / "bad.json").write_text('[{"torch": "x.weight", "path": "x", "kind": "linear"}]')
    assert "no row of the naming has this path" in fails(*own, "--naming", "bad.json")
    assert "is already a lora_jax adapter" in fails(*own[:-1], "native", "--model", "my-model")
    paths = fails(*own, "--model", "my-model")
    assert "q_proj/kernel: no row of the naming has this path" in paths
    (world / "made").mkdir()
    (world / "made" / "x").touch()
    assert "exists already" in fails(*words, "folded")
    adapter = world / "my-adapter" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:50])
    assert "adapter_model.safetensors" in fails(*words, "folded", "--force")
