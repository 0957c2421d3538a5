"""Mutants of what `lora-jax` trains on, evaluates and reports, and of its choice of layers."""

from tests.stress.mutants.mutant import Mutant

OPTIONS = (["tests/cli/train/options"],)
CHOICES = (["tests/cli/test_eval_answers.py", "tests/cli/test_eval.py"],)
REPORTS = (["tests/training/reporting"],)
LOSS = (["tests/training/test_loss.py", "tests/training/test_loop.py"],)
TURNS = (["tests/training/test_tokenize.py"],)

MUTANTS = [
    Mutant(
        "take the first layers for the last ones",
        "cli/jobs/training/train.py",
        'layers=f"-{count}:"',
        'layers=f":{count}"',
        OPTIONS,
    ),
    Mutant(
        "train on prompts where they are masked",
        "training/tokenize.py",
        "if not mask_prompts:",
        "if mask_prompts:",
        OPTIONS,
    ),
    Mutant(
        "favour short answers in the normalized accuracy",
        "training/evaluation/choices.py",
        "(of / question.sizes).argmax()",
        "of.argmax()",
        CHOICES,
    ),
    Mutant(
        "favour long answers in the normalized accuracy",
        "training/evaluation/choices.py",
        "(of / question.sizes).argmax()",
        "(of * question.sizes).argmax()",
        CHOICES,
    ),
    Mutant(
        "count the tokens of questions",
        "training/evaluation/choices.py",
        '(batch["weights"][:, 1:] > 0) & (before == here)',
        "before == here",
        CHOICES,
    ),
    Mutant(
        "count answers from 1",
        "training/rows/choices.py",
        "return letters.index(answer)",
        "return letters.index(answer) - 1",
        CHOICES,
    ),
    Mutant(
        "let the last token of a text predict the next text",
        "training/cross_entropy.py",
        '(batch["ids"][:, 1:], batch["weights"][:, 1:])',
        '(batch["ids"][:, 1:], batch["weights"][:, :-1])',
        LOSS,
    ),
    Mutant(
        "weigh batches alike in an evaluation",
        "training/loop.py",
        'loss = float(total["loss"] / total["weight"])',
        'loss = float(total["loss"])',
        LOSS,
    ),
    Mutant(
        "report an evaluation as training",
        "training/reporting/scalars.py",
        'group = "eval" if "eval_loss" in record else "train"',
        'group = "train"',
        REPORTS,
    ),
    Mutant(
        "report resumed steps twice",
        "training/reporting/reporters.py",
        "log.rewind(self._path, done)",
        "pass",
        REPORTS,
    ),
    Mutant(
        "hide the last step before a run was resumed",
        "training/reporting/reporters.py",
        "again = done + 1 if done else None",
        "again = done if done else None",
        REPORTS,
    ),
    Mutant(
        "train on what the user says",
        "training/turns.py",
        'if message["role"] == ASSISTANT]',
        'if message["role"] != "system"]',
        TURNS,
    ),
]
