"""Adapters made here on encoders, images and speech, loaded by peft: equal outputs.

    python -m tests.parity.peft.check_kinds write FOLDER
    python -m tests.parity.peft.check_kinds read FOLDER

The first needs lora_jax; the second torch, transformers and peft (checked with 2.13, 5.24 and
0.21.2), so the suite runs neither. `write` puts adapters with random factors on the recorded models
and writes them as PEFT's files, with the outputs here. `read` loads them with peft, which must find
no missing and no unexpected key, and prints the largest differences of the outputs.
"""

import pathlib
import sys
import warnings

import numpy as np

FIXTURES = pathlib.Path(__file__).parents[2] / "models" / "fixtures"
LIMIT = 1e-4
#: Model -> targets, and whether they are linear layers alone, which peft's DoRA takes here.
CASES = {
    "roberta": (["query/kernel", "intermediate/kernel"], True),
    "modernbert": (["qkv/kernel", "mlp/input/kernel", "mlp/output/kernel"], True),
    "vit": (["query/kernel", "up/kernel", "patch/kernel"], False),
    "siglip_vision": (["layer_0/attention/output/kernel", "patch/kernel"], False),
    "siglip": (["layer_0/attention/query/kernel", "token/embedding"], False),
    "clip_vision": (["query/kernel", "value/kernel"], True),
    "whisper": (["query/kernel", "value/kernel"], True),
}


def inputs(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / name / "expected.npz") as file:
        keys = ("ids", "mask", "pixels", "features")
        found = {key: file[key] for key in keys if key in file.files}
    if "pixels" in found and name != "siglip":
        del found["ids"]
    return found


def write(folder: pathlib.Path) -> None:
    import jax

    import lora_jax as lora
    from lora_jax import models, peft

    rng = np.random.default_rng(0)
    random = lambda x: x + (0.3 * rng.normal(size=x.shape)).astype(np.float32)

    def moved(keys, x):
        """Return a random factor, and a scale as it is."""
        return x if jax.tree_util.keystr(keys).endswith(".scale") else random(x)

    for name, (targets, is_linear) in CASES.items():
        model, given = models.load(FIXTURES / name), inputs(name)
        given = {"segments" if key == "mask" else key: x for key, x in given.items()}
        if "segments" in given:
            given["segments"] = given["segments"].astype(np.int32)
        for kind in ("plain", *(["dora"] if is_linear else [])):
            options = {"dora": True, "scaling": "rslora"} if kind == "dora" else {}
            train = ["classifier"] if name == "vit" else []
            config = lora.LoraConfig(rank=3, alpha=4, targets=targets, train=train, **options)
            run = lambda params, given, model=model: model.apply(params, **given)
            params = lora.init(jax.random.key(0), model.params, config, run, given)
            base, adapters = lora.split(params)
            adapters = jax.tree_util.tree_map_with_path(moved, adapters)
            out = folder / f"{name}-{kind}"
            peft.save(out, adapters, model.naming, base=base, config=config)
            y = jax.jit(lora.lora(run))(lora.join(base, adapters), given)
            np.savez(out / "y.npz", y=y, plain=jax.jit(run)(base, given))


def read(folder: pathlib.Path) -> None:
    import peft
    import torch
    import transformers

    warnings.simplefilter("error")
    for harmless in (".*is_gradient_checkpointing", ".*save_embedding_layers"):
        warnings.filterwarnings("ignore", harmless)
    classes = {
        "vit": transformers.ViTForImageClassification,
        "whisper": transformers.WhisperForConditionalGeneration,
    }
    for path in sorted(folder.iterdir()):
        name = path.name.rpartition("-")[0]
        kind = classes.get(name, transformers.AutoModel)
        model = kind.from_pretrained(FIXTURES / name, attn_implementation="eager")
        model = peft.PeftModel.from_pretrained(model, path).eval()
        given = {key: torch.asarray(x) for key, x in inputs(name).items()}
        renamed = {
            "ids": "decoder_input_ids" if name == "whisper" else "input_ids",
            "mask": "attention_mask",
            "pixels": "pixel_values",
            "features": "input_features",
        }
        last_first = {"pixels": (0, 3, 1, 2), "features": (0, 2, 1)}
        given = {
            renamed[key]: x.permute(last_first[key]) if key in last_first else x
            for key, x in given.items()
        }
        with torch.no_grad():
            found = model(**given)
        for key in ("logits", "logits_per_image", "last_hidden_state"):
            if key in found:
                want = found[key].numpy()
                break
        with np.load(path / "y.npz") as file:
            ours, plain = file["y"], file["plain"]
        mask = given.get("attention_mask")
        there = 1 if mask is None else mask.numpy()[..., None]
        apart, moved = (float(np.abs((x - ours) * there).max()) for x in (want, plain))
        print(f"{path.name:22} {apart:.1e}  (adapters move by {moved:.1e})", flush=True)
        assert apart < LIMIT < moved, path.name


if __name__ == "__main__":
    command, where = sys.argv[1:]
    {"write": write, "read": read}[command](pathlib.Path(where))
