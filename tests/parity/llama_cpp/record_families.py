"""Record what llama.cpp's convert_lora_to_gguf.py makes of an adapter of each family of models.

    LLAMA=llama_cpp_python-0.3.36/vendor/llama.cpp python -m tests.parity.llama_cpp.record_families

Needs torch, transformers and safetensors. Writes `families.npz`: the GGUF files, by family.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from safetensors.numpy import save_file

from tests.parity.llama_cpp import families

OUT = pathlib.Path(__file__).parent / "families.npz"


def convert(family, folder):
    base = folder / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(families.config(family)))
    tensors, values = families.adapter(family)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(values))
    script = pathlib.Path(os.environ["LLAMA"]) / "convert_lora_to_gguf.py"
    made = folder / "adapter.gguf"
    words = [sys.executable, script, "--base", base, "--outfile", made, folder]
    subprocess.run(words, check=True)
    return np.fromfile(made, np.uint8)


if __name__ == "__main__":
    found = {}
    for name in families.FAMILIES:
        with tempfile.TemporaryDirectory() as place:
            found[name] = convert(name, pathlib.Path(place))
    np.savez_compressed(OUT, **found)
