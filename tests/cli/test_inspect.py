"""`inspect` against the dense update and numpy's SVD of it."""

import json
import re
import shutil

import numpy as np
import pytest

from lora_jax.cli.jobs.spectrum import spectrum
from lora_jax.files.contained_factors import read_factors
from lora_jax.files.disk import safetensors_file
from tests.cli import files

KINDS = {
    "peft": lambda folder: files.peft(folder / "adapter"),
    "mlx": lambda folder: files.mlx(folder / "adapter"),
    "native": lambda folder: files.native(folder / "adapter.safetensors"),
}
RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    "sizes", [(12, 4, 8), (3, 5, 8), (8, 5, 3), (6, 1, 6)], ids="{0[0]}-{0[1]}-{0[2]}".format
)
def test_the_spectrum_is_that_of_the_dense_update(sizes):
    n_in, rank, n_out = sizes
    a, b = RNG.normal(size=(n_in, rank)), RNG.normal(size=(rank, n_out))
    update = -0.7 * a @ b
    found, s = spectrum(a, b, -0.7), np.linalg.svd(update, compute_uv=False)
    np.testing.assert_allclose(found.singular_values, s[: min(sizes)], rtol=1e-10)
    np.testing.assert_allclose(found.norm, np.linalg.norm(update), rtol=1e-12)
    np.testing.assert_allclose(found.stable_rank, np.sum(s**2) / s[0] ** 2, rtol=1e-10)
    for share in (0.5, 0.9, 0.99):
        energies = [np.sum(s[:k] ** 2) / np.sum(s**2) for k in range(len(s) + 1)]
        assert found.directions(share) == next(k for k, e in enumerate(energies) if e >= share)
    assert found.norm_a == pytest.approx(np.linalg.norm(a), rel=1e-12)
    assert found.norm_b == pytest.approx(np.linalg.norm(b), rel=1e-12)


def test_the_spectrum_by_hand():
    found = spectrum(np.diag([1.0, 2.0]), np.diag([3.0, 2.0]), 0.5)  # ΔW = diag(1.5, 2)
    np.testing.assert_allclose(found.singular_values, [2, 1.5], rtol=1e-12)
    assert found.norm == pytest.approx(2.5)
    assert found.stable_rank == pytest.approx(6.25 / 4)
    assert [found.directions(share) for share in (0.64, 0.65, 1.0)] == [1, 2, 2]


def test_an_update_of_zero_and_one_that_is_not_finite():
    still = spectrum(np.ones((3, 2)), np.zeros((2, 4)), 1.0)
    assert (still.norm, still.stable_rank, still.directions(0.9)) == (0, 0, 0)
    broken = spectrum(np.full((3, 2), np.nan), np.ones((2, 4)), 1.0)
    assert np.isnan(broken.norm) and np.isnan(broken.stable_rank) and broken.directions(0.9) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_json_holds_every_module(kind, run, tmp_path):
    done = run("inspect", KINDS[kind](tmp_path), "--json")
    assert (done.status, done.err) == (0, "")
    record = json.loads(done.out)
    assert (record["kind"], record["base"], record["variant"]) == (kind, "tiny", "LoRA")
    assert record["targets"] == ["q_proj", "v_proj"] and record["dtypes"] == ["float32"]
    assert record["parameters"] == 4 * (files.WIDTH + files.OUT) * files.RANK
    updates = [2.0 * a @ b for a, b in files.factors().values()]
    got = sorted(record["modules"], key=lambda module: module["norm_update"])
    for module, update in zip(got, sorted(updates, key=np.linalg.norm), strict=True):
        assert (module["rank"], module["alpha"], module["scale"]) == (4, 8, 2)
        assert (module["in"], module["out"]) == update.shape
        s = np.linalg.svd(update, compute_uv=False)[:4]
        np.testing.assert_allclose(module["singular_values"], s, rtol=1e-5)


def test_names_of_stacked_layers(tmp_path):
    file = read_factors(files.native(tmp_path / "a.safetensors"))
    names = [f"{p}_proj/kernel[{n}]" for p in "qv" for n in range(2)]
    assert [one.module for one in file.factors] == names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [40, 60, 80, 100, 120, 200])
def test_the_table_fits_the_terminal(kind, columns, run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    done = run("inspect", KINDS[kind](tmp_path))
    assert done.status == 0 and max(map(len, done.out.splitlines())) <= columns
    joined = "".join(done.out.split())
    assert "320infloat32" in joined
    (line,) = (x for x in done.out.splitlines() if re.search(r"^ .*q_proj\S* ", x))
    numbers = len(line.split()) - 2  # besides the module and its count
    assert numbers >= {40: 3, 60: 4, 80: 7, 100: 9, 120: 10, 200: 10}[columns]
    assert ("alsoshows" in joined) == (numbers < 10)


def test_a_narrow_table_says_what_it_leaves_out(run, tmp_path, monkeypatch):
    """What all names begin with stands above the table; the numbers are those of the wide one."""
    adapter = files.peft(tmp_path / "adapter")
    monkeypatch.setenv("COLUMNS", "80")
    narrow = run("inspect", adapter).out
    assert re.search(r"modules +in model\.layers\.\*\.self_attn\.\s*\n", narrow)
    assert "A wider terminal also shows σ₁; --json shows all." in narrow
    norms = [np.linalg.norm(2.0 * a @ b) for a, b in files.factors().values()][::2]
    assert f" {min(norms):.2g}–{max(norms):.2g} " in narrow


def test_one_line_for_each_module(run, tmp_path):
    adapter = files.peft(tmp_path / "adapter")
    grouped, single = run("inspect", adapter).out, run("inspect", adapter, "--all").out
    assert "model.layers.*.self_attn.q_proj" in grouped
    assert all(module in single for module in files.MODULES) and files.MODULES[0] not in grouped


def test_ranks_and_alphas_of_patterns(tmp_path, run):
    narrow = {f"base_model.model.{files.MODULES[0]}.lora_A.weight": np.ones((2, 12), np.float32)}
    narrow |= {f"base_model.model.{files.MODULES[0]}.lora_B.weight": np.ones((8, 2), np.float32)}
    config = {
        "rank_pattern": {"layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.v_proj": 3},
        "use_rslora": True,
    }
    file = read_factors(files.peft(tmp_path / "adapter", config=config, extra=narrow))
    assert file.variant == "rsLoRA"
    got = {one.module: (one.a.shape[1], one.alpha, one.scale) for one in file.factors}
    wanted = [(2, 8, 8 / 2**0.5), (4, 8, 4), (4, 8, 4), (4, 3, 1.5)]
    for module, numbers in zip(files.MODULES, wanted, strict=True):
        np.testing.assert_allclose(got[module], numbers, rtol=1e-12)


def test_experts_have_a_line_each(tmp_path):
    """In PEFT, expert e has the rows e·r:(e+1)·r of A, but the columns e::E of B."""
    a, b = RNG.normal(size=(3 * 4, 12)), RNG.normal(size=(8, 4 * 3))
    name = "base_model.model.model.layers.0.experts"
    extra = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    config = {"target_parameters": ["experts.up"]}
    file = read_factors(files.peft(tmp_path / "adapter", config=config, extra=extra))
    found = {one.module: one for one in file.factors}
    for e in range(3):
        one = found[f"model.layers.0.experts.up[{e}]"]
        np.testing.assert_array_equal(one.a @ one.b, (b[:, e::3] @ a[4 * e : 4 * e + 4]).T)


@pytest.mark.parametrize("case", ["both", "one layer", "transposed", "first axis in", "patterns"])
def test_parameters_of_experts_have_their_names(case, tmp_path, run):
    """PEFT wraps a module once a parameter; in the recorded model they differ in their sizes."""
    recorded = np.load("tests/parity/peft/recorded/experts.npz")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / file).write_bytes(recorded[f"{case}/{file}"].tobytes())
    sizes = {"up_proj": (4, 5), "down_proj": (5, 4), "gate_up": (4, 10), "down": (5, 4)}
    sizes |= {"up": (5, 4), "q": (4, 4)}  # PEFT takes the last axis for the inputs
    file = read_factors(tmp_path)
    for one in file.factors:
        leaf = re.sub(r"\[\d\]", "", one.module).rpartition(".")[2]
        assert (one.a.shape[0], one.b.shape[1]) == sizes[leaf], one.module
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    parameters = {name.rpartition(".")[2] for name in config["target_parameters"]}
    assert set(file.targets) == parameters | set(config["target_modules"])
    ranks = {one.module: one.a.shape[1] for one in file.factors}
    if case == "patterns":
        assert ranks["layers.0.experts.up_proj[2]"] == 3 and ranks["layers.1.q"] == 1
    assert "experts.*.up" not in run("inspect", tmp_path).out


def test_magnitudes_are_said(tmp_path, run):
    name = f"base_model.model.{files.MODULES[0]}.lora_magnitude_vector"
    extra = {name: np.ones(8, np.float32)}
    adapter = files.peft(tmp_path / "adapter", config={"use_dora": True}, extra=extra)
    done = run("inspect", adapter)
    assert "LoRA, DoRA" in done.out and "lora_magnitude_vector [8]" in done.out
    assert "without the effect of DoRA's magnitudes" in done.out


def test_tensors_that_are_no_factors_are_named(tmp_path, run):
    head = {"base_model.model.head.weight": np.ones((3, 8), np.float32)}
    done = run("inspect", files.peft(tmp_path / "adapter", extra=head))
    assert "head.weight [3, 8]" in done.out and "344 in float32" in done.out


def test_values_that_are_not_finite_are_said(tmp_path, run):
    name = f"base_model.model.{files.MODULES[0]}.lora_B.weight"
    broken = {name: np.full((8, 4), np.nan, np.float32)}
    adapter = files.peft(tmp_path / "adapter", extra=broken)
    done = run("inspect", adapter)
    assert done.status == 0 and f"NaN or infinite values in {files.MODULES[0]}\n" in done.out
    record = json.loads(run("inspect", adapter, "--json").out)
    assert record["modules"][0]["norm_update"] is None


def test_failures(tmp_path, fails):
    adapter = files.peft(tmp_path / "adapter")
    assert "no such file or directory" in fails("inspect", tmp_path / "none")
    assert "is empty" in fails("inspect", _made(tmp_path / "empty"))
    assert "shows the usage" in fails("inspect", status=2)
    assert "No such option" in fails("inspect", adapter, "--colour", status=2)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": -1}')
    assert "r must be a positive integer" in fails("inspect", adapter)
    (adapter / "adapter_config.json").write_text('{"peft_type": ')
    assert "not valid JSON" in fails("inspect", adapter)
    (adapter / "adapter_config.json").write_text('{"rank": 3}')
    assert "it has rank" in fails("inspect", adapter)
    (adapter / "adapter_config.json").unlink()
    assert "it contains adapter_model.safetensors" in fails("inspect", adapter)
    assert "without its adapter_config.json" in fails(
        "inspect", adapter / "adapter_model.safetensors"
    )


def test_a_truncated_file_and_one_without_its_other_half(tmp_path, fails):
    adapter = files.peft(tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    data = path.read_bytes()
    for size in (0, 5, 100, len(data) - 1):
        path.write_bytes(data[:size])
        assert str(path) in fails("inspect", adapter)
    path.unlink()
    assert "no such file" in fails("inspect", adapter)
    extra = {"base_model.model.x.lora_A.weight": np.ones((4, 8), np.float32)}
    half = files.peft(tmp_path / "half", extra=extra)
    assert "x: has lora_A.weight but not lora_B.weight" in fails("inspect", half)


def test_the_directory_of_a_run(tmp_path, run, fails):
    """It stands for its last adapter, here and wherever an adapter is read."""
    files.peft(tmp_path / "run" / "adapter", seed=1)
    files.peft(tmp_path / "run" / "best", seed=2)
    (tmp_path / "run" / "log.jsonl").write_text("{}\n")
    own, inside = run("inspect", tmp_path / "run"), run("inspect", tmp_path / "run" / "adapter")
    best = f"{tmp_path / 'run' / 'best'} has the lowest held-out loss of this run.\n"
    assert own.out == inside.out + best and best not in inside.out
    record = json.loads(run("inspect", tmp_path / "run", "--json").out)
    assert record["path"] == str(tmp_path / "run" / "adapter")
    words = ["convert", tmp_path / "run", "--to", "mlx", "--out", tmp_path / "mlx"]
    assert run(*words).status == 0
    a, _ = files.factors(1)[files.MODULES[0]]
    one = next(x for x in read_factors(tmp_path / "mlx").factors if x.module == files.MODULES[0])
    np.testing.assert_array_equal(one.a, a)
    shutil.rmtree(tmp_path / "run" / "adapter")
    assert str(tmp_path / "run" / "best") in run("inspect", tmp_path / "run", "--json").out
    (tmp_path / "run" / "best").rename(tmp_path / "run" / "checkpoint-9")
    assert "; checkpoint-9 is an adapter" in fails("inspect", tmp_path / "run")
    files.native(tmp_path / "run" / "adapter.safetensors")  # of a classifier
    assert "lora_jax adapter" in run("inspect", tmp_path / "run").out


def test_a_model_is_no_adapter(tmp_path, fails):
    to = ("--to", "mlx", "--out", tmp_path / "out")
    (_made(tmp_path / "model") / "config.json").write_text("{}")
    assert "a model checkpoint, not an adapter" in fails("convert", tmp_path / "model", *to)
    (tmp_path / "m.gguf").write_bytes(b"GGUF0000")
    assert "a GGUF model, not an adapter" in fails("convert", tmp_path / "m.gguf", *to)


def _made(directory):
    directory.mkdir()
    return directory


HOSTILE = "a\x1b[2J\x07\u202eb"


def test_what_a_file_says_does_not_steer_the_terminal(run, tmp_path):
    files.peft(tmp_path / "a", config={"base_model_name_or_path": HOSTILE})
    done = run("inspect", tmp_path / "a")
    assert done.status == 0 and done.out.replace("\n", "").isprintable()
    assert "a\\x1b[2J\\x07\\u202eb" in done.out
    files.peft(tmp_path / "b", config={"r": HOSTILE})
    done = run("inspect", tmp_path / "b")
    assert done.status == 1 and done.err[:-1].isprintable() and "\\u202e" in done.err


@pytest.mark.parametrize("shape", [(), (0,), (0, 12), (4, 0), (12,), (4, 12, 0)])
@pytest.mark.parametrize("kind", ["peft", "mlx"])
def test_a_factor_that_is_no_matrix_or_empty(kind, shape, run, tmp_path):
    path = KINDS[kind](tmp_path)
    file = next(path.glob("*.safetensors"))
    tensors, metadata = safetensors_file.read(file)
    name = next(iter(tensors))
    safetensors_file.write(file, tensors | {name: np.ones(shape, np.float32)}, metadata)
    done = run("inspect", path)
    assert done.status == 1 and "q_proj" in done.err and str(shape) in done.err


def test_values_of_any_size_are_shown_without_a_warning(run, tmp_path):
    path = files.peft(tmp_path / "a")
    tensors, metadata = safetensors_file.read(path / "adapter_model.safetensors")
    large = {name: np.full(x.shape, 1e300) for name, x in tensors.items()}
    safetensors_file.write(path / "adapter_model.safetensors", large, metadata)
    done = run("inspect", path, "--json")
    assert (done.status, done.err) == (0, "")
    assert json.loads(done.out)["modules"][0]["norm_a"] is None
