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

import functools
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
EVERY = tuple(range(len(ROWS)))
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


class Recorder:
    """A base, an adapter and the rows, which all trainers share, and what was recorded of them."""

    def __init__(self, directory: Path):
        import peft
        import torch
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer

        out = tempfile.mkdtemp()
        self.data = Dataset.from_list([dict(zip(NAMES, row, strict=True)) for row in ROWS])
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.base = lambda: AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.lora = peft.LoraConfig(
            r=2,
            lora_alpha=4,
            target_modules=["q_proj", "v_proj"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(0)
        self.saved = Path(out) / "adapter"
        peft.get_peft_model(self.base(), self.lora).save_pretrained(self.saved)
        self.adapter = peft.load_peft_weights(str(self.saved))
        self.found = {
            f"adapter/{name}": np.frombuffer((self.saved / name).read_bytes(), np.uint8)
            for name in ("adapter_model.safetensors", "adapter_config.json")
        }
        self.common = {
            **{"output_dir": out, "report_to": [], "bf16": False, "use_cpu": True, "beta": BETA},
            **{"gradient_checkpointing": False, "max_grad_norm": 0.0, "learning_rate": RATE},
            **{"lr_scheduler_type": "constant", "logging_steps": 1, "max_steps": STEPS},
            **{"per_device_train_batch_size": 2, "save_strategy": "no", "max_length": 48},
            **{"disable_tqdm": True, "train_sampling_strategy": "sequential"},
        }

    def trainer(self, make, config, *, model=None, **options):
        """Return a trainer of a model, or of a new adapter with the recorded values."""
        import peft

        trainer = make(
            model=self.base() if model is None else model,
            args=config(**self.common | options),
            train_dataset=self.data,
            processing_class=self.tokenizer,
            **({"peft_config": self.lora} if model is None else {}),
        )
        if model is None:
            peft.set_peft_model_state_dict(trainer.model, self.adapter)
        return trainer

    def batch(self, trainer, rows=EVERY):
        """Return rows as the trainer hands them to its loss."""
        return trainer.data_collator([trainer.train_dataset[i] for i in rows])

    def take_gradients(self, trainer, name: str) -> None:
        """Keep the gradients of the adapter, and forget them in the model."""
        for path, x in trainer.model.named_parameters():
            if x.grad is not None:
                key = path.replace(".default", "").replace("base_model.model.model", "model")
                self.found[f"{name}/gradient/{key}"] = x.grad.numpy().copy()
        trainer.model.zero_grad()


def record_losses(recorder: Recorder) -> None:
    """Record each loss of the DPO trainer on all rows."""
    import torch
    import trl

    found = recorder.found
    for kind, options in LOSSES.items():
        trainer = recorder.trainer(trl.DPOTrainer, trl.DPOConfig, loss_type=[kind], **options)
        batch = recorder.batch(trainer)
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        found[f"{kind}/loss"] = loss.detach().numpy()
        recorder.take_gradients(trainer, kind)
        if kind == "sigmoid":
            found["ids"] = batch["input_ids"].numpy()
            found["mask"] = batch["completion_mask"].numpy()
            found["there"] = batch["attention_mask"].numpy()
            reference = trainer.compute_ref_log_probs(trainer.model, batch)
            found["reference"] = torch.stack(reference).numpy()
            for name, values in trainer._metrics["train"].items():
                found[f"metrics/{name}"] = np.asarray(values[0])


def record_steps(recorder: Recorder) -> None:
    """Record three steps of DPO from a new adapter, and from a trained one."""
    import peft
    import trl

    load = functools.partial(peft.PeftModel.from_pretrained, is_trainable=True)
    for start in ("new", "trained"):
        model = None if start == "new" else load(recorder.base(), str(recorder.saved))
        trainer = recorder.trainer(trl.DPOTrainer, trl.DPOConfig, model=model)
        losses = watch(trainer)
        trainer.train()
        logs = [x for x in trainer.state.log_history if "loss" in x]
        for ours, theirs in (("margin", "rewards/margins"), ("accuracy", "rewards/accuracies")):
            values = np.array([float(x[theirs]) for x in logs])
            recorder.found[f"steps/{start}/{ours}"] = values
        recorder.found[f"steps/{start}/loss"] = np.array(losses)


def record_pairs(recorder: Recorder, name: str, make, config, options) -> None:
    """Record the mean of the losses of one pair at a time, which is what is trained on."""
    found, trainer = recorder.found, recorder.trainer(make, config, **options)
    trainer.model.train()
    total = 0
    for i in range(len(ROWS)):
        batch = recorder.batch(trainer, [i])
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
    recorder.take_gradients(trainer, name)
    loss, _ = trainer.get_batch_loss_metrics(trainer.model, recorder.batch(trainer))
    found[f"{name}/loss of one batch"] = loss.detach().numpy()


def record(directory: Path) -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}
    import trl
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    assert trl.__version__ == "1.16.0", trl.__version__
    recorder = Recorder(directory)
    record_losses(recorder)
    record_steps(recorder)
    simpo = {"loss_type": "simpo", "simpo_gamma": 0.4, "cpo_alpha": 0.0}
    record_pairs(recorder, "orpo", ORPOTrainer, ORPOConfig, {})
    cpo = {"cpo_alpha": 0.5, "label_smoothing": 0.1}
    record_pairs(recorder, "cpo", CPOTrainer, CPOConfig, cpo)
    record_pairs(recorder, "simpo", CPOTrainer, CPOConfig, simpo)
    found = recorder.found
    np.savez_compressed(FILE, rows=json.dumps(ROWS), **found)
    print({k: np.asarray(v).shape for k, v in found.items() if "gradient" not in k})
    is_loss = lambda k, v: k.endswith(("loss", "one batch")) and np.ndim(v) == 0
    print({k: float(v) for k, v in found.items() if is_loss(k, v)})
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
