"""`lora-jax train` on a random model of a hundred thousand parameters, and data for it."""

import json

from lora_jax.training.dataset import KEYS

TEXT = "To be, or not to be, that is the question.\n" * 40
SMALL = ("--length", 32, "--batch", 2, "--rank", 2, "--lr", "3e-2", "--targets", "q_proj,v_proj")


def words(data, out, *more, small=SMALL):
    given = ["train", "--model", "tiny", "--data", data, "--out", out, *small, *more]
    return [str(word) for word in given]


def jsonl(path, kind, count=6):
    made = {
        "text": lambda i: {"text": f"line {i}"},
        "completion": lambda i: {"prompt": f"{i} + 1 =", "completion": f" {i + 1}"},
        "chat": lambda i: {
            "messages": [
                {"role": "user", "content": f"Say {i}"},
                {"role": "assistant", "content": str(i)},
            ]
        },
        "label": lambda i: {"text": f"good {i}" if i % 2 else f"bad {i}", "label": i % 2},
        "preference": lambda i: {
            "prompt": f"{i} + 1 =",
            "chosen": f" {i + 1}",
            "rejected": f" {i + 2}, or more",
        },
        "choice": lambda i: {"prompt": f"{i} + 1 =", "choices": ["no", str(i + 1)], "answer": 1},
    }
    assert made.keys() == KEYS.keys()
    path.write_text("".join(json.dumps(made[kind](i)) + "\n" for i in range(count)))
    return path
