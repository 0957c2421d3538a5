"""Programs compiled for devices that are not there, and what is read from their text."""

import importlib.util
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks import ahead_of_time, hlo, topologies
from benchmarks.ahead_of_time import Setting, Step

ROOT = pathlib.Path(__file__).parents[2]

# One product, a loop of 5 with an in-place update and a gather, and arrays that a TPU keeps nearby.
TEXT = """HloModule m, is_scheduled=true

%update (p0: f32[5,8], p1: f32[8], p2: s32[]) -> f32[5,8] {
  %p0 = f32[5,8]{1,0} parameter(0)
  %p1 = f32[8]{0} parameter(1)
  %p2 = s32[] parameter(2)
  %row = f32[1,8]{1,0} bitcast(%p1)
  %zero = s32[] constant(0)
  ROOT %dus = f32[5,8]{1,0} dynamic-update-slice(%p0, %row, %p2, %zero)
}

%body (s: (s32[], f32[5,8], f32[8])) -> (s32[], f32[5,8], f32[8]) {
  %s = (s32[], f32[5,8]{1,0}, f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %all = f32[5,8]{1,0} get-tuple-element(%s), index=1
  %x = f32[8]{0} get-tuple-element(%s), index=2
  %sum = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
  %new = f32[5,8]{1,0} fusion(%all, %sum, %i), kind=kLoop, calls=%update
  ROOT %t = (s32[], f32[5,8]{1,0}, f32[8]{0}) tuple(%i, %new, %sum)
}

%cond (s.1: (s32[], f32[5,8], f32[8])) -> pred[] {
  %s.1 = (s32[], f32[5,8]{1,0}, f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %n = s32[] constant(5)
  ROOT %lt = pred[] compare(%i.1, %n), direction=LT
}

ENTRY %main (a: f32[4,8], b: bf16[8,2], s.2: (s32[], f32[5,8], f32[8])) -> f32[4,2] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = bf16[8,2]{1,0} parameter(1)
  %near = f32[4,8]{1,0:T(8,128)S(1)} copy(%a)
  %s.2 = (s32[], f32[5,8]{1,0}, f32[8]{0}) parameter(2)
  %w = (s32[], f32[5,8]{1,0}, f32[8]{0}) while(%s.2), condition=%cond, body=%body
  %call = (f32[4,2]{1,0}, s8[4194304]{0}) custom-call(%near, %b), custom_call_target="__cublas$gemm"
  ROOT %out = f32[4,2]{1,0} get-tuple-element(%call), index=0
}
"""


def test_bytes_and_collectives_by_hand():
    found = hlo.cost(TEXT)
    copy = 4 * 8 * 4  # read; what is written stays nearby
    product = 8 * 2 * 2 + 4 * 2 * 4  # b and the result: no workspace
    turn = (8 + 8) * 4 + (8 + 8 + 1) * 4  # the sum; then it and i are read, and a row is written
    assert found.bytes == copy + product + 5 * turn
    assert found.collectives == {"all-reduce": 5} and found.payload == {"all-reduce": 5 * 8 * 4}


def test_a_product_over_a_mesh(optimized):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    at = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
    shape = lambda m, n, *axes: jax.ShapeDtypeStruct((m, n), jnp.float32, sharding=at(*axes))
    product = jax.jit(jnp.dot, out_shardings=at())
    text = product.lower(shape(16, 64, None, "x"), shape(64, 32, "x")).compile().as_text()
    found = hlo.cost(text)
    assert found.collectives == {"all-reduce": 1} and found.payload["all-reduce"] == 16 * 32 * 4
    least = 4 * (16 * 16 + 16 * 32 + 16 * 32)  # one device's parts, and the result
    assert least <= found.bytes <= least + 4 * 4 * 16 * 32  # copies, and the sum over devices


@pytest.mark.slow
def test_a_step_on_a_mesh_has_the_collectives_of_its_base():
    """Tensor parallel: factors lie as their weights do; one sum more, of gradients and norm."""
    step = Step(Setting("cpu:4", "tensor=4", "tiny", "none", 2, length=16, scan=False))
    floor, mine = step.floor(), step.adapted()
    assert set(floor.cost.collectives) == {"all-reduce"}
    assert hlo.compare(mine.cost, floor.cost) == {"all-reduce": 1}
    assert mine.cost.bytes > floor.cost.bytes and mine.flops > floor.flops
    read = {key: x for key, x in step.base.items() if key != "embedding"}
    base = sum(np.prod(x.shape) * 2 for x in jax.tree.leaves(read))
    assert base / 4 < floor.arguments < base / 3  # sharded by four, the norms and the batch whole
    assert not topologies.chip("cpu:4").flops > 0  # no bound for a CPU


def test_mistakes():
    for arguments, said in (
        (["--topology", "v9:2"], "v9 is none of v5e"),
        (["--topology", "cpu:2", "--mesh", "tensor=4"], "needs 4 devices, and cpu:2 has 2"),
        (["--topology", "cpu:999"], "set XLA_FLAGS=--xla_force_host_platform_device_count=999"),
    ):
        with pytest.raises(SystemExit, match=said):
            ahead_of_time.main([*arguments, "--model", "tiny"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "module"), [("v5e:2x2", "libtpu"), ("h100:4", "jax_plugins.xla_cuda12")]
)
def test_a_step_for_a_device_that_is_not_there(topology, module):
    try:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError
    except ModuleNotFoundError:
        pytest.skip(f"{module} is not installed")
    words = ["--topology", topology, "--model", "tiny", "--mesh", "fsdp=2,tensor=2"]
    command = [sys.executable, "-m", "benchmarks.ahead_of_time", *words, "--length", "64"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert topology in done.stdout and "all-gather" in done.stdout
