"""Record what TRL's trainers compute of six preferences: trl.npz.

    python -m tests.parity.trl.record_trl write DIR     where lora_jax is installed
    python tests/parity/trl/record_trl.py record DIR    with trl 1.16.0, peft 0.21.2, torch 2.13

The model is a Llama of two layers, with an adapter of rank 2 on its queries and values. "new" is
the adapter as PEFT draws it with `init_lora_weights=False` on top of the base, so TRL's reference
is the base; "trained" is the same adapter loaded before training, so the reference is its copy.
Gradients have PEFT's names and shapes. The keys are "KIND/new/…" for a batch of all rows with each
loss of the DPO trainer, "steps/…" for the losses of three steps of AdamW on two rows each, and
"orpo/…", "simpo/…", "cpo/…" for the other trainers.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "trl.npz"
ROWS = [
    ("2 + 2 =", " 4", " 5, I think"),
    ("Say hi:", " hi!", " no"),
    ("The sky is", " blue", " a fish"),
    ("Count: 1, 2,", " 3, 4, 5", " 7"),
    ("A", "b", "z"),
    ("Name a fruit.", " Apple", " A stone, or two"),
]
NAMES = ("prompt", "chosen", "rejected")
LOSSES = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "sigmoid_norm": {},
    "robust": {"label_smoothing": 0.1},
}
BETA = 0.3
RATE = 0.02
STEPS = 3


def write(directory: Path) -> None:
    from tests.cli import files

    files.model(directory)


def record(directory: Path) -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}
    import peft
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    assert trl.__version__ == "1.16.0", trl.__version__
    data = Dataset.from_list([dict(zip(NAMES, row, strict=True)) for row in ROWS])
    tokenizer = AutoTokenizer.from_pretrained(directory)
    out = tempfile.mkdtemp()
    lora = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    base = lambda: AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    torch.manual_seed(0)
    peft.get_peft_model(base(), lora).save_pretrained(f"{out}/adapter")
    adapter = peft.load_peft_weights(f"{out}/adapter")
    found = {
        f"adapter/{name}": np.frombuffer((Path(out) / "adapter" / name).read_bytes(), np.uint8)
        for name in ("adapter_model.safetensors", "adapter_config.json")
    }
    common = {
        **{"output_dir": out, "report_to": [], "bf16": False, "use_cpu": True, "beta": BETA},
        **{"gradient_checkpointing": False, "max_grad_norm": 0.0, "learning_rate": RATE},
        **{"lr_scheduler_type": "constant", "logging_steps": 1, "max_steps": STEPS},
        **{"per_device_train_batch_size": 2, "save_strategy": "no", "max_length": 48},
        **{"disable_tqdm": True, "train_sampling_strategy": "sequential"},
    }

    def new(make, config, **options):
        """Return a trainer of a new adapter with the recorded values."""
        trainer = make(
            model=base(),
            args=config(**common | options),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=lora,
        )
        peft.set_peft_model_state_dict(trainer.model, adapter)
        return trainer

    def gradients(trainer, name):
        for path, x in trainer.model.named_parameters():
            if x.grad is not None:
                key = path.replace(".default", "").replace("base_model.model.model", "model")
                found[f"{name}/gradient/{key}"] = x.grad.numpy().copy()
        trainer.model.zero_grad()

    for kind, options in LOSSES.items():
        trainer = new(trl.DPOTrainer, trl.DPOConfig, loss_type=[kind], **options)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(ROWS))])
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        found[f"{kind}/loss"] = loss.detach().numpy()
        gradients(trainer, kind)
        if kind == "sigmoid":
            found["ids"] = batch["input_ids"].numpy()
            found["mask"] = batch["completion_mask"].numpy()
            found["there"] = batch["attention_mask"].numpy()
            reference = trainer.compute_ref_log_probs(trainer.model, batch)
            found["reference"] = torch.stack(reference).numpy()
            for name, values in trainer._metrics["train"].items():
                found[f"metrics/{name}"] = np.asarray(values[0])
    for start in ("new", "trained"):
        if start == "new":
            trainer = new(trl.DPOTrainer, trl.DPOConfig)
        else:
            model = peft.PeftModel.from_pretrained(base(), f"{out}/adapter", is_trainable=True)
            trainer = trl.DPOTrainer(
                model, args=trl.DPOConfig(**common), train_dataset=data, processing_class=tokenizer
            )
        losses = watch(trainer)
        trainer.train()
        logs = [x for x in trainer.state.log_history if "loss" in x]
        for ours, theirs in {
            "margin": "rewards/margins",
            "accuracy": "rewards/accuracies",
        }.items():
            found[f"steps/{start}/{ours}"] = np.array([float(x[theirs]) for x in logs])
        found[f"steps/{start}/loss"] = np.array(losses)

    for name, make, config, options in (
        ("orpo", ORPOTrainer, ORPOConfig, {}),
        ("cpo", CPOTrainer, CPOConfig, {"cpo_alpha": 0.5, "label_smoothing": 0.1}),
        (
            "simpo",
            CPOTrainer,
            CPOConfig,
            {"loss_type": "simpo", "simpo_gamma": 0.4, "cpo_alpha": 0.0},
        ),
    ):
        trainer = new(make, config, **options)
        trainer.model.train()
        total = 0
        for i in range(len(ROWS)):  # one pair at a time: their mean is what is trained on
            batch = trainer.data_collator([trainer.train_dataset[i]])
            loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
            (loss / len(ROWS)).backward()
            total = total + loss.detach() / len(ROWS)
            for key, value in metrics.items():
                found.setdefault(f"{name}/metrics/{key}", []).append(float(value))
            for side in ("chosen", "rejected"):
                found[f"{name}/{side}/{i}"] = np.stack(
                    [batch[f"{side}_input_ids"][0], batch[f"{side}_labels"][0]]
                )
        found[f"{name}/loss"] = total.numpy()
        gradients(trainer, name)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(ROWS))])
        loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
        found[f"{name}/loss of one batch"] = loss.detach().numpy()
    np.savez_compressed(FILE, rows=json.dumps(ROWS), **found)
    print({k: np.asarray(v).shape for k, v in found.items() if "gradient" not in k})
    print(
        {
            k: float(v)
            for k, v in found.items()
            if k.endswith(("loss", "one batch")) and np.ndim(v) == 0
        }
    )
    print({k: v for k, v in found.items() if k.startswith("steps")}, FILE.stat().st_size)


def watch(trainer) -> list[float]:
    """Return a list that gets the loss of each step, unrounded."""
    losses, compute = [], trainer.compute_loss

    def compute_loss(*args, **options):
        loss = compute(*args, **options)
        losses.append(float(loss.detach()))
        return loss

    trainer.compute_loss = compute_loss
    return losses


if __name__ == "__main__":
    {"write": write, "record": record}[sys.argv[1]](Path(sys.argv[2]))
