"""Record what llama.cpp says of our adapters, and what its converter makes of a PEFT directory.

    python -m tests.parity.llama_cpp.record_llama_cpp write FOLDER
    LLAMA=llama_cpp_python-0.3.36/vendor/llama.cpp \
        python -m tests.parity.llama_cpp.record_llama_cpp run FOLDER

The first step needs lora_jax and writes models and adapters; the second needs llama.cpp, see
check_llama_cpp.py, and torch and transformers for convert_lora_to_gguf.py.
It writes `llama_cpp.npz`:

    <case>/file, base, logits     our file, and llama.cpp's logits without and with it
    converter/...                 a PEFT directory, and llama.cpp's conversion of it
"""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np

from tests.parity.llama_cpp import tiny_model
from tests.parity.llama_cpp.adapters import CASES, MODULES, factors

OUT = pathlib.Path(__file__).parent / "llama_cpp.npz"
CONVERTED = [name for name, (rank, scale, *_) in MODULES.items() if (rank, scale) == (3, 2.0)]


def write(folder):
    from lora_jax import gguf, models, peft
    from lora_jax.files.disk import safetensors_file
    from tests.parity.llama_cpp.test_gguf_adapters import EMBEDDING, peft_files

    for case, (architecture, tied, _) in CASES.items():
        own = folder / case
        own.mkdir(parents=True, exist_ok=True)
        tiny_model.write(own / "model.gguf", architecture, tied)
        model = models.load(own / "model.gguf")
        peft_files(case, own)
        adapters = peft.load(own, model.params, model.naming)
        names = models.gguf_names(model)
        gguf.save(own / "adapter.gguf", adapters, names, base=model.params, base_model="me/tiny")
    own, tensors = folder / "converter", {}
    own.mkdir(exist_ok=True)
    for module in CONVERTED:
        names = ("lora_A.weight", "lora_B.weight")
        if module == EMBEDDING:
            names = ("lora_embedding_A", "lora_embedding_B")
        for name, x in zip(names, factors("llama")[module][:2], strict=True):
            tensors[f"base_model.model.{module}.{name}"] = x
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6.0, "target_modules": CONVERTED}
    (own / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))
    safetensors_file.write(own / "adapter_model.safetensors", tensors, {"format": "pt"})


def run(folder):
    from tests.parity.llama_cpp.check_llama_cpp import logits

    found = {}
    for case in CASES:
        own = folder / case
        found[f"{case}/file"] = np.fromfile(own / "adapter.gguf", np.uint8)
        found[f"{case}/base"] = logits(own / "model.gguf")
        found[f"{case}/logits"] = logits(own / "model.gguf", own / "adapter.gguf")
    own, base = folder / "converter", folder / "base"
    base.mkdir(exist_ok=True)
    sizes = {"hidden_size": tiny_model.WIDTH, "intermediate_size": tiny_model.HIDDEN}
    sizes |= {"num_attention_heads": tiny_model.HEADS, "num_key_value_heads": tiny_model.GROUPS}
    sizes |= {"num_hidden_layers": tiny_model.LAYERS, "vocab_size": tiny_model.VOCABULARY}
    config = sizes | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    config |= {"rms_norm_eps": 1e-5, "max_position_embeddings": 64}
    (base / "config.json").write_text(json.dumps(config))
    script = pathlib.Path(os.environ["LLAMA"]) / "convert_lora_to_gguf.py"
    made = own / "adapter.gguf"
    subprocess.run([sys.executable, script, "--base", base, "--outfile", made, own], check=True)
    found["converter/file"] = np.fromfile(made, np.uint8)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        found[f"converter/{name}"] = np.fromfile(own / name, np.uint8)
    np.savez_compressed(OUT, **found)


if __name__ == "__main__":
    step, place = sys.argv[1:]
    {"write": write, "run": run}[step](pathlib.Path(place))
