"""Draw PEFT adapters at random and convert them with llama.cpp: the oracle of `check_random.py`.

    LLAMA=llama_cpp_python-0.3.36/vendor/llama.cpp \
        python -m tests.parity.llama_cpp.record_random FOLDER COUNT SEED

Needs torch, transformers and safetensors. Writes `<n>/adapter.gguf` beside the PEFT files, and
`<n>/family.json`: the family, the number of layers, and what the converter said where it refused.
"""

import contextlib
import io
import json
import os
import pathlib
import random
import runpy
import sys

import torch
from safetensors.torch import save_file

from tests.parity.llama_cpp import families

OUTTYPES = ("f32", "f16", "bf16", "q8_0")  # "auto" fails in this version
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def adapter(family: str, rng: random.Random) -> tuple[dict, dict, int]:
    """Return the tensors and the configuration of a random adapter, and how many layers it has."""
    values = torch.Generator().manual_seed(rng.randrange(10**9))
    layers, rank = rng.randrange(1, 4), rng.choice((1, 2, 4, 5))
    dtype = rng.choice(DTYPES)
    chosen = {m for m in families.linear(family) if ".experts." in m or rng.random() < 0.7}
    draw = lambda *shape: torch.randn(shape, generator=values).to(dtype)
    tensors = {}
    for layer in rng.sample(range(layers), rng.randrange(1, layers + 1)):
        for module, (inputs, outputs) in families.linear(family).items():
            if module in chosen:
                name = f"base_model.model.model.layers.{layer}.{module}"
                tensors[f"{name}.lora_A.weight"] = draw(rank, inputs)
                tensors[f"{name}.lora_B.weight"] = draw(outputs, rank)
    if rng.random() < 0.3 and family != "gemma3_text":  # the converter would need the vocabulary
        name = "base_model.model.model.embed_tokens"
        tensors[f"{name}.lora_embedding_A"] = draw(rank, families.VOCABULARY)
        tensors[f"{name}.lora_embedding_B"] = draw(families.WIDTH, rank)
    if rng.random() < 0.3 and "gemma" not in family:  # whose head it leaves out
        tensors["base_model.model.lm_head.lora_A.weight"] = draw(rank, families.WIDTH)
        tensors["base_model.model.lm_head.lora_B.weight"] = draw(families.VOCABULARY, rank)
    modules = sorted(
        {name.split(".lora_")[0].removeprefix("base_model.model.") for name in tensors}
    )
    config = {"peft_type": "LORA", "r": rank, "target_modules": modules, "bias": "none"}
    return tensors, config | {"lora_alpha": rng.choice((1, 2.5, 16, 0.3))}, layers


def main() -> None:
    folder, count, seed = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    script = pathlib.Path(os.environ["LLAMA"]) / "convert_lora_to_gguf.py"
    sys.path.insert(0, str(script.parent))
    for n in range(count):
        rng, own = random.Random(f"{seed} {n}"), folder / str(n)
        family = rng.choice(families.FAMILIES)
        tensors, config, layers = adapter(family, rng)
        (own / "base").mkdir(parents=True)
        values = families.config(family) | {"num_hidden_layers": layers}
        values |= {"tie_word_embeddings": False, "no_rope_layers": [1] * layers}
        (own / "base" / "config.json").write_text(json.dumps(values))
        save_file(tensors, own / "adapter_model.safetensors")
        (own / "adapter_config.json").write_text(json.dumps(config))
        words = [str(script), "--base", str(own / "base"), "--outfile", str(own / "adapter.gguf")]
        sys.argv = [*words, "--outtype", rng.choice(OUTTYPES), str(own)]
        said = {"family": family, "layers": layers, "words": sys.argv[5:7]}
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                runpy.run_path(str(script), run_name="__main__")
        except BaseException as error:  # whatever it refuses
            said["error"] = f"{type(error).__name__}: {error}"
        (own / "family.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
