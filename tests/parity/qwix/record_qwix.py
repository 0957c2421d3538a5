"""Record arrays of qwix and what it dequantizes them to: tests/parity/qwix/qwix.npz.

Run it where qwix is installed (recorded with 0.1.8 and jax 0.10.2):
`python tests/parity/qwix/record_qwix.py`. Arrays are recorded as bytes, with their dtypes by name,
because npz has neither 4-bit nor FP8 numbers.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import qwix

HERE = pathlib.Path(__file__).parent
MINMAX = {"calibration_method": "minmax"}

TILES = {"channelwise_axes": [1], "tiled_axes": {0: 32}}
SHORT = {"channelwise_axes": [1], "tiled_axes": {0: 16}}

# name -> shape, qtype, arguments of qwix.quantize
CASES = {
    "int8_per_output": ((32, 12), jnp.int8, {"channelwise_axes": [1]}),
    "int8_whole": ((32, 12), jnp.int8, {}),
    "int8_tiled_zero": ((64, 6), jnp.int8, SHORT | MINMAX),
    "int8_bfloat16": ((32, 12), jnp.int8, {"channelwise_axes": [1], "scale_dtype": jnp.bfloat16}),
    "int4_tiled": ((64, 6), jnp.int4, TILES),
    "int4_zero": ((64, 6), jnp.int4, TILES | MINMAX),
    "int4_odd": ((33, 6), jnp.int4, {"channelwise_axes": [1]}),
    "int3_heads": ((16, 2, 8), "int3", {"channelwise_axes": [1, 2]}),
    "int6_two_axes": ((2, 8, 16), "int6", {"channelwise_axes": [2]}),
    "int8_squares": ((32, 32), jnp.int8, {"tiled_axes": {0: 16, 1: 8}}),
    "int8_per_number": ((4, 6), jnp.int8, {"channelwise_axes": [0, 1]}),
    "nf4_tiled": ((64, 6), "nf4", TILES),
    "nf4_last": ((6, 64), "nf4", {"channelwise_axes": [0], "tiled_axes": {1: 32}}),
    "fp8": ((32, 12), jnp.float8_e4m3fn, {"channelwise_axes": [1]}),
    "mxfp8": ((64, 6), "mxfp8", TILES),
    "mxfp4": ((64, 6), "mxfp4", TILES),
    "nvfp4": ((64, 6), "nvfp4", SHORT),
}


def stored(array) -> tuple[np.ndarray, list]:
    """Return the bytes of an array, and what they are: 4-bit numbers have a byte each."""
    array = np.asarray(array)
    return np.frombuffer(array.tobytes(), np.uint8), [array.dtype.name, list(array.shape)]


def main() -> None:
    arrays, what = {}, {}
    for i, (name, (shape, qtype, how)) in enumerate(CASES.items()):
        w = jax.random.normal(jax.random.key(i), shape) + 0.3
        q = qwix.quantize(w, qtype, **how)
        parts = {"qvalue": q.qvalue, "scale": q.scale, "values": qwix.dequantize(q)}
        parts |= {} if q.zero_point is None else {"zero_point": q.zero_point}
        qtype = q.qtype if isinstance(q.qtype, str) else jnp.dtype(q.qtype).name
        what[name] = {"qtype": qtype}
        for part, x in parts.items():
            arrays[f"{name}/{part}"], what[name][part] = stored(x)
    arrays["what"] = np.frombuffer(json.dumps(what).encode(), np.uint8)
    np.savez_compressed(HERE / "qwix.npz", **arrays)


if __name__ == "__main__":
    main()
