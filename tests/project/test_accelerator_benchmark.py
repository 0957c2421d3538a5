"""`python -m benchmarks.accelerator`: its contenders agree, and a row that fails stops no other."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.accelerator import __main__ as command
from benchmarks.accelerator import blocks, model, tables
from benchmarks.accelerator.blocks import Setting
from benchmarks.accelerator.size import SIZES

pytestmark = pytest.mark.usefixtures("promotion")
TINY = dataclasses.replace(SIZES["small"], width=16, ffn=24, heads=2, time=4, repeats=1)


@pytest.fixture
def promotion():
    """As users have it: a norm's scale meets an activation with more axes."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("scanned", [False, True])
def test_the_contenders_compute_the_same_loss(scanned, quick_compile):
    setting = Setting(dataclasses.replace(TINY, dtype="float32"), rank=2, scanned=scanned)
    makes = [
        blocks.lora,
        lambda s: blocks.lora(s, tables.PLAIN),
        lambda s: blocks.by_hand(s, jnp.float32),
        blocks.merged,
    ]
    contenders = [make(setting) for make in makes]
    starts = [contender.start() for contender in contenders]
    frozen = blocks.floor(setting)
    run = lambda starts: [c.step(*start)[1] for c, start in zip(contenders, starts, strict=True)]
    *losses, floor = jax.jit(lambda starts, bare: (*run(starts), frozen.step(*bare)[1]))(
        starts, frozen.start()
    )
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
    assert abs(float(losses[0] - floor)) > 1e-3  # B is not zero


@pytest.mark.slow
def test_the_model_trains(quick_compile):
    figures = model.time_model(TINY, model.config(TINY, "blocks", "none"), 2, 2, 4)
    assert figures["tokens_per_second"] > 0 and np.isfinite(figures["loss"])
    kernels = 4 * 16 * 16 + 3 * 16 * 24 + 2 * 8 * 16 * 16
    assert figures["parameters"] == kernels + 3 * 16  # norms
    shapes = jax.eval_shape(
        model.Decoder(model.config(TINY, "8B", "full")).init,
        jax.random.key(0),
        jnp.zeros((1, 1), jnp.int32),
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 8_030_261_248  # as published


def test_a_row_that_fails_shows_its_error(monkeypatch, tmp_path, capsys, quick_compile):
    def rows(size):
        """Return three rows."""
        yield "floor", lambda: {"ms": 2.0}
        yield "breaks", lambda: jnp.ones(3) @ jnp.ones(4)
        yield "lora", lambda: {"ms": 3.0}

    monkeypatch.setitem(command.TABLES, "three", rows)
    # not the heap and the programs of the whole suite
    monkeypatch.setattr(command.gc, "collect", lambda: 0)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    out = tmp_path / "figures.json"
    command.main(["--size", "small", "--only", "three", "--out", str(out)])
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["device"] == "cpu (cpu)" and found["date"].endswith("UTC")
    three = found["tables"]["three"]
    assert three["lora"] == {"ms": 3.0, "over_the_floor": 1.5}
    assert three["breaks"]["error"].startswith("TypeError: ")
    assert "breaks" in capsys.readouterr().out
    command.main(["--size", "small", "--only", "three", "--seconds", "0", "--out", str(out)])
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["tables"]["three"]["lora"] == {"error": "no time was left"}
    with pytest.raises(SystemExit):
        command.main(["--only", "nonsense"])


@pytest.mark.slow
def test_every_row_runs_at_the_small_size(tmp_path, quick_compile):
    out = tmp_path / "figures.json"
    command.main(["--size", "small", "--out", str(out)])
    found = json.loads(out.read_text(encoding="utf-8"))["tables"]
    failed = {name for table in found.values() for name, row in table.items() if "error" in row}
    assert set(found) == set(tables.TABLES)
    assert failed == set(found["peft"])  # PyTorch has no CUDA device here
