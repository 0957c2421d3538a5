"""Record what transformers makes of published configurations: tests/models/fixtures/published.json.

Run it in an environment with PyTorch and transformers (recorded with 2.13 and 5.24):
`python tests/models/record_published.py`. The file says of each model its config.json (the factors
of `longrope` are others, as many) and "parameters", the number on its page, tied heads counted
once, of Gemma 3 with images those of its text. Added are transformers' own count, by models without
values, the windows of the layers with how many follow one another, and for each rotation the sum
of its frequencies; null where transformers 5.24 refuses the file ("su", of Phi-3's first).
"""

import importlib
import itertools
import json
import pathlib

import torch
import transformers

PATH = pathlib.Path(__file__).parent / "fixtures" / "published.json"


def main() -> None:
    rows = json.loads(PATH.read_text())
    for row in rows.values():
        try:
            row["transformers"] = of_transformers(row["config"])
        except KeyError:
            row["transformers"] = None
    write(rows)


def write(rows: dict[str, dict[str, object]]) -> None:
    """Write one line per model."""
    lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()]
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def of_transformers(given: dict[str, object]) -> dict[str, object]:
    config = transformers.CONFIG_MAPPING[given["model_type"]].from_dict(given)
    config = config.get_text_config()
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    windows = [window(config, layer) for layer in model.model.layers]
    return {
        "parameters": sum(x.numel() for x in model.parameters()),
        "windows": [[x, len([*same])] for x, same in itertools.groupby(windows)],
        "frequencies": frequencies(config),
    }


def window(config: transformers.PretrainedConfig, layer: torch.nn.Module) -> int | None:
    if hasattr(layer.self_attn, "sliding_window"):
        return layer.self_attn.sliding_window
    of_all = config.model_type in ("mistral", "mixtral", "phi3")
    return config.sliding_window if of_all else None


def frequencies(config: transformers.PretrainedConfig) -> dict[str, float]:
    module = importlib.import_module(type(config).__module__.replace("configuration", "modeling"))
    kinds = [getattr(module, x) for x in dir(module) if x.endswith("RotaryEmbedding")]
    buffers = kinds[0](config).named_buffers()
    return {name: float(x.double().sum()) for name, x in buffers if "original" not in name}


if __name__ == "__main__":
    main()
