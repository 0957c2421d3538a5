"""Mutants of training: preferences, optimizers, files with weights, evaluation and reports."""

from tests.stress.mutants.mutant import Mutant

PREFERENCES = (["tests/parity/trl", "tests/training/test_preferences.py"],)
OPTIMIZERS = (["tests/training/optimizers", "tests/training/test_step.py"],)
MIXING = (["tests/training/test_mixing.py", "tests/cli/train/options/test_files.py"],)
LOOP = (["tests/training/test_loop.py", "tests/training/test_patience.py"],)
OPTIONS = (["tests/cli/train/options"],)
CHOICES = (["tests/cli/test_eval_answers.py"],)
REPORTS = (["tests/training/reporting"],)

PREFERENCE_RUN = (["tests/cli/train/test_preference.py"],)

MUTANTS = [
    Mutant(
        "prefer the rejected completion",
        "training/preference/losses.py",
        "delta = ratios[0] - ratios[1]\n",
        "delta = ratios[1] - ratios[0]\n",
        PREFERENCES,
    ),
    Mutant(
        "forget the reference of what is rejected",
        "training/preference/losses.py",
        "policy.rejected - reference.rejected",
        "policy.rejected",
        PREFERENCES,
    ),
    Mutant(
        "smooth no labels",
        "training/preference/losses.py",
        "return -(1 - smoothing) * right - smoothing * wrong if smoothing else -right",
        "return -right",
        PREFERENCES,
    ),
    Mutant(
        "leave the robust loss biased",
        "training/preference/losses.py",
        "* right) / (1 - 2 * smoothing)",
        "* right)",
        PREFERENCES,
    ),
    Mutant(
        "aim at twice the margin of IPO",
        "training/preference/losses.py",
        "(delta - 1 / (2 * beta)) ** 2",
        "(delta - 1 / beta) ** 2",
        PREFERENCES,
    ),
    Mutant(
        "take IPO's log-probabilities of whole texts",
        "training/preference/losses.py",
        '"ipo": lambda _, delta, beta, __:',
        '"ipo": lambda delta, _, beta, __:',
        PREFERENCES,
    ),
    Mutant(
        "leave out SimPO's margin",
        "training/preference/losses.py",
        "(chosen - rejected) - gamma",
        "(chosen - rejected)",
        PREFERENCES,
    ),
    Mutant(
        "leave out the odds against",
        "training/preference/losses.py",
        "chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected))",
        "chosen - rejected",
        PREFERENCES,
    ),
    Mutant(
        "let CPO forget the chosen text",
        "training/preference/losses.py",
        "- alpha * _means(policy)[0]",
        "- alpha * _means(policy)[1]",
        PREFERENCES,
    ),
    Mutant(
        "train ORPO on the completion alone",
        "training/preference/log_probs.py",
        "text = total(follows, found)[:, 0]",
        "text = total(completion, found)[:, 0]",
        PREFERENCES,
    ),
    Mutant(
        "take the other side for the reference",
        "training/preference/log_probs.py",
        "chosen, rejected = jnp.moveaxis(batch[REFERENCE], 1, 0)",
        "rejected, chosen = jnp.moveaxis(batch[REFERENCE], 1, 0)",
        PREFERENCE_RUN,
    ),
    Mutant(
        "count tokens of the prompt as completions",
        "training/preference/log_probs.py",
        "sums, counts = total(completion, found), jnp.maximum(total(completion, ones), 1)",
        "sums, counts = total(follows, found), jnp.maximum(total(follows, ones), 1)",
        PREFERENCES,
    ),
    Mutant(
        "compare with the model that trains",
        "cli/jobs/training/reference.py",
        "start.params if options.reference == START else task.params",
        "start.params",
        PREFERENCE_RUN,
    ),
    Mutant(
        "decay no weights by Lion",
        "training/optimizers/kinds.py",
        "optax.lion(rate, weight_decay=decay)",
        "optax.lion(rate)",
        OPTIMIZERS,
    ),
    Mutant(
        "decay SGD's weights without its rate",
        "training/optimizers/kinds.py",
        "optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(rate))",
        "optax.chain(optax.sgd(rate), optax.add_decayed_weights(-weight_decay))",
        OPTIMIZERS,
    ),
    Mutant(
        "give B the rate of A",
        "training/optimizers/kinds.py",
        "lora.lora_plus(rate, adapters, b_ratio, one)",
        "lora.lora_plus(rate, adapters, 1.0, one)",
        OPTIMIZERS,
    ),
    Mutant(
        "take the layers of a stack for rows of Muon's matrices",
        "training/optimizers/muon.py",
        'batch = len(node.layout.positions("b"))',
        "batch = 0",
        OPTIMIZERS,
    ),
    Mutant(
        "update heads by Muon",
        "training/optimizers/muon.py",
        '_BY_ADAM = ("embedding", "head")',
        '_BY_ADAM = ("embedding",)',
        OPTIMIZERS,
    ),
    Mutant(
        "visit all rows of mixed files once",
        "training/mixing/visits.py",
        "size = max(1, round(weight * count))",
        "size = max(1, count)",
        MIXING,
    ),
    Mutant(
        "visit the same part of a file in each epoch",
        "training/mixing/visits.py",
        "return range(epoch * size, (epoch + 1) * size)",
        "return range(0, size)",
        MIXING,
    ),
    Mutant(
        "stream files without their weights",
        "training/mixing/visits.py",
        "range(math.floor(epoch * weight * count), math.floor((epoch + 1) * weight * count))",
        "range(epoch * count, (epoch + 1) * count)",
        MIXING,
    ),
    Mutant(
        "keep the last adapter as the best",
        "training/loop.py",
        'if all(found["eval_loss"] < r["eval_loss"] for r in known)',
        "if True",
        LOOP,
    ),
    Mutant(
        "keep the worst adapter as the best",
        "training/loop.py",
        'found["eval_loss"] < r["eval_loss"]',
        'found["eval_loss"] > r["eval_loss"]',
        LOOP,
    ),
    Mutant(
        "wait from the last of the best evaluations",
        "training/log.py",
        "len(found) - 1 - found.index(min(found))",
        "found[::-1].index(min(found))",
        LOOP,
    ),
]
