"""Mutants of serving: who has which row, what it says, and where it ends; and generation."""

from tests.stress.mutants.mutant import Mutant

SCHEDULER = (["tests/serving/test_scheduler.py"],)
ROWS = (["tests/serving/test_rows.py"],)
ASKED = (["tests/serving/test_asked.py"],)
SERVER = (["tests/serving/test_server.py"],)
STOPS = (["tests/models/text/test_stop_text.py", "tests/serving/test_scheduler.py"],)
GENERATION = (["tests/models/test_generation.py"],)

MUTANTS = [
    Mutant(
        "draw tokens at the temperature 1",
        "models/sampling.py",
        "logits.astype(jnp.float32) / sampling.temperature",
        "logits.astype(jnp.float32)",
        GENERATION,
    ),
    Mutant(
        "write over a token that ended a row",
        "models/generation.py",
        "tokens = np.where(ended, tokens, chosen)",
        "tokens = chosen",
        GENERATION,
    ),
    Mutant(
        "keep the row of a job that is done",
        "serving/scheduler.py",
        "self.rows.leave(row)\n",
        "pass\n",
        SCHEDULER,
    ),
    Mutant(
        "let the last job that waits go first",
        "serving/scheduler.py",
        "job = self._waiting.popleft()\n",
        "job = self._waiting.pop()\n",
        SCHEDULER,
    ),
    Mutant(
        "let any number of jobs wait",
        "serving/scheduler.py",
        "if len(self._waiting) + len(self._running) + len(jobs) > most:",
        "if False:",
        SCHEDULER,
    ),
    Mutant(
        "let a failing prompt take all rows with it",
        "serving/scheduler.py",
        "if self.rows.lost:",
        "if True:",
        SCHEDULER,
    ),
    Mutant(
        "let long prompts hold up the others",
        "serving/scheduler.py",
        "while prompts < PROMPT_TOKENS and (row",
        "while (row",
        SCHEDULER,
    ),
    Mutant(
        "continue one token too long",
        "serving/job.py",
        "if self.made >= self.most:",
        "if self.made > self.most:",
        SCHEDULER,
    ),
    Mutant(
        "say the text of an end token",
        "serving/job.py",
        "if token.token in self._ends:",
        "if False:",
        SCHEDULER,
    ),
    Mutant(
        "keep the adapter of the row before",
        "serving/rows.py",
        "self._slots[row], self._params = slot, None",
        "self._slots[row] = slot",
        ROWS,
    ),
    Mutant(
        "put a prompt into the columns of another text",
        "serving/rows.py",
        "self._first[row] = self._filled - count",
        "self._first[row] = self._filled",
        ROWS,
    ),
    Mutant(
        "begin a row at the step of the last text in it",
        "serving/rows.py",
        "self._tokens[row], self._steps[row] = found.token, 1",
        "self._tokens[row] = found.token",
        ROWS,
    ),
    Mutant(
        "draw every token with the same key",
        "serving/row_sampling.py",
        "folded = jax.vmap(jax.random.fold_in)(keys, steps)",
        "folded = keys",
        ROWS,
    ),
    Mutant(
        "draw from the logits of another row",
        "serving/row_sampling.py",
        "(folded, left(logits, controls))",
        "(folded, left(logits[::-1], controls))",
        ROWS,
    ),
    Mutant(
        "draw the tokens of greedy rows too",
        "serving/row_sampling.py",
        "return jnp.where(temperature > 0, drawn, greedy)",
        "return drawn",
        ROWS,
    ),
    Mutant(
        "report logits as log-probabilities",
        "serving/row_sampling.py",
        "return values - total[:, None], ids",
        "return values, ids",
        ROWS,
    ),
    Mutant(
        "put a prompt at the first column",
        "serving/columns.py",
        "own = jnp.roll(own, cache.filled - prompt.filled, columns)",
        "pass",
        ROWS,
    ),
    Mutant(
        "take the first column for those before it",
        "serving/columns.py",
        "known = (columns >= 0) & (columns < cache.filled)",
        "known = columns < cache.filled",
        ROWS,
    ),
    Mutant(
        "give out the beginning of a stop text",
        "models/text/stop_text.py",
        "kept = max((_overlap(self._held, stop) for stop in self._stops), default=0)",
        "kept = 0",
        STOPS,
    ),
    Mutant(
        "end at the stop text that begins last",
        "models/text/stop_text.py",
        "return self._held[: min(ends)[1]]",
        "return self._held[: max(ends)[1]]",
        STOPS,
    ),
    Mutant(
        "say a stop text",
        "models/text/stop_text.py",
        "return self._held[: min(ends)[1]]",
        "return self._held[: min(ends)[0]]",
        STOPS,
    ),
    Mutant(
        "swallow what was held back at the end",
        "models/text/stop_text.py",
        'return "" if self.ended else self._held',
        'return ""',
        STOPS,
    ),
    Mutant(
        "ignore fields that are not known",
        "serving/fields.py",
        "for name in sorted(self._given.keys() - {*known, *inert}):",
        "for name in ():",
        ASKED,
    ),
    Mutant(
        "take integers beyond their bounds",
        "serving/fields.py",
        "is_integer(value) and lowest <= value <= highest",
        "is_integer(value)",
        ASKED,
    ),
    Mutant(
        "let a completion outgrow the context",
        "serving/asked.py",
        "if len(ids) + wanted > self.context:",
        "if False:",
        ASKED,
    ),
    Mutant(
        "count the tokens of prompts alone",
        "serving/answers.py",
        '"total_tokens": prompt + made',
        '"total_tokens": prompt',
        SERVER,
    ),
]
