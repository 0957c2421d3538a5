"""Record what layers of MaxText 0.2.5 compute with the LoRA factors that qwix gives them.

    PYTHONPATH=SITE:. python -m tests.parity.checkpoints.record_maxtext

SITE has maxtext 0.2.5 (whose modules need Python 3.12) and qwix 0.1.8; requirements that these
layers do not use are stubbed. The layers are MaxText's `DenseGeneral` with the shapes that its
`Attention` and `MlpBlock` give them, and the rank, alpha and paths those of its
`_build_lora_provider`. Writes `maxtext.npz`:

    tree/<path>     random factors; the weights are zeros
    delta/<path>    what each layer adds: its result for each unit vector
    llama/<path>, qwen/<path>    that delta in Hugging Face's order, by MaxText's own functions
"""

import importlib.abc
import importlib.machinery
import pathlib
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx

OUT = pathlib.Path(__file__).parent / "maxtext.npz"
STUBBED = ("aqt", "pathwaysutils", "tensorboardX", "omegaconf", "cloud_tpu_diagnostics", "google")
STUBBED += ("torch", "huggingface_hub", "tqdm", "safetensors", "pydantic", "psutil")
STUBBED += ("grain", "tensorflow", "ml_goodput_measurement", "transformers", "datasets", "tokamax")
WIDTH, HEADS, SIZE, HIDDEN, RANK, ALPHA = 6, 2, 4, 5, 3, 2.0
PATHS = ".*(self_attention/(query|key|value|out)|mlp/(wi_0|wi_1|wo))"


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports packages that are absent as mocks."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in STUBBED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return mock.MagicMock(name=spec.name, __path__=[], __spec__=spec, __file__="stub")

    def exec_module(self, module):
        pass


class Part(nnx.Module):
    """A module of layers by name, each called with its own inputs."""

    def __init__(self, **layers):
        for name, layer in layers.items():
            setattr(self, name, layer)


class Model(nnx.Module):
    """`decoder/layers_0`, as MaxText's decoder has its layers where it does not scan them."""

    def __init__(self):
        from maxtext.layers.linears import DenseGeneral

        rngs = nnx.Rngs(0)
        count = lambda x: len(x) if isinstance(x, tuple) else 1
        dense = lambda ins, outs, axis=-1: DenseGeneral(
            ins, outs, axis, kernel_axes=(None,) * (count(ins) + count(outs)), rngs=rngs
        )
        heads = lambda count: dense(WIDTH, (count, SIZE))
        out = dense((HEADS, SIZE), WIDTH, (-2, -1))
        attention = {"query": heads(HEADS), "key": heads(1), "value": heads(1), "out": out}
        mlp = {
            "wi_0": dense(WIDTH, HIDDEN),
            "wi_1": dense(WIDTH, HIDDEN),
            "wo": dense(HIDDEN, WIDTH),
        }
        layer = Part(self_attention=Part(**attention), mlp=Part(**mlp))
        self.decoder = Part(layers_0=layer)

    def __call__(self, inputs):
        """Return the result of each layer for its own inputs."""
        layer = self.decoder.layers_0
        part = lambda path: getattr(getattr(layer, path.split("/")[0]), path.split("/")[1])
        return {path: part(path)(x) for path, x in inputs.items()}


#: The axes of the inputs of each layer.
INPUTS = {f"self_attention/{x}": (WIDTH,) for x in ("query", "key", "value")}
INPUTS |= {"self_attention/out": (HEADS, SIZE)}
INPUTS |= {"mlp/wi_0": (WIDTH,), "mlp/wi_1": (WIDTH,), "mlp/wo": (HIDDEN,)}


def record() -> dict[str, np.ndarray]:
    """Return factors and what they add, by path."""
    provider = qwix.LoraProvider(module_path=PATHS, rank=RANK, alpha=ALPHA, dropout=0.0)
    units = {path: jnp.eye(int(np.prod(x))).reshape(-1, *x) for path, x in INPUTS.items()}
    model = qwix.apply_lora_to_model(Model(), provider, units, rngs=nnx.Rngs(1))
    state, found = nnx.state(model, nnx.Param), {}
    rng = np.random.default_rng(3)
    for path, leaf in nnx.to_flat_state(state):
        name = "/".join(map(str, path))
        value = jnp.asarray(rng.normal(size=leaf.shape), "float32")
        leaf.value = value if "lora" in name else jnp.zeros(leaf.shape)
        if "lora" in name:
            found[f"tree/{name}"] = np.asarray(value)
    nnx.update(model, state)
    for path, x in model(units).items():
        delta = np.asarray(x).reshape(*INPUTS[path], *x.shape[1:])
        found[f"delta/decoder/layers_0/{path}/kernel"] = delta
    return found


def converted(deltas: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return deltas as `to_huggingface` makes them of kernels, `[out, in]`."""
    from maxtext.checkpoint_conversion.utils import param_mapping

    config, found = {"num_hidden_layers": 1, "head_dim": SIZE}, {}
    for family, name in (("llama", "LLAMA31"), ("qwen", "QWEN")):
        make = getattr(param_mapping, f"{name}_MAXTEXT_TO_HF_PARAM_HOOK_FN")
        hooks = make(config, None, scan_layers=False, saving_to_hf=True)
        for path, x in deltas.items():
            local = path.removeprefix("delta/")
            ins = int(np.prod(INPUTS[local.removeprefix("decoder/layers_0/")[: -len("/kernel")]]))
            chain = hooks[f"params-{local.replace('/', '-')}"]
            for hook in chain if isinstance(chain, list) else [chain]:
                x = hook(x, (x.size // ins, ins))
            found[f"{family}/{local}"] = np.asarray(x)
    return found


def main() -> None:
    sys.meta_path.append(Stubs())
    arrays = record()
    arrays |= converted({name: x for name, x in arrays.items() if name.startswith("delta/")})
    np.savez_compressed(OUT, **arrays)
    print({name: x.shape for name, x in arrays.items()}, OUT.stat().st_size)


if __name__ == "__main__":
    with jax.default_matmul_precision("highest"):
        main()
