"""Random options, files of options and data for `lora-jax train`.

    python -m tests.stress.train_options --count 300 --seed 0     the same runs for the same numbers
    python -m tests.stress.train_options --sort data --only 17    one of them, with what it prints

Every run must succeed and leave an adapter that can be read, or fail with one line that names an
option or a file, and leave none. `--dump-config` then `--config` must repeat a run to the bit, and
an option that is left out must make a difference, unless it is one of those that may make none.
Prints how the runs ended, each sort of problem with a command that shows it, and the options
without effect. Exits with 1 where there is a problem.
"""

import argparse
import os
import random
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TQDM_DISABLE", "1")

import jax

from tests.stress.train_options import check, configs, options, world

Words = tuple[list[str], str]  # of a run, and what else is to be known of it


def of_options(draw: random.Random, number: int) -> list[str]:
    """Return random options, on files that are as they should be."""
    return options.draw_words(draw)


def of_data(draw: random.Random, number: int) -> list[str]:
    """Return few options, on a damaged file of data."""
    task = draw.choice([*world.TAKES])
    kind = draw.choice(world.TAKES[task] if draw.random() < 0.8 else world.KINDS)
    odd = world.odd_file(draw, kind, f"odd{number}")
    Path(odd.name).write_bytes(odd.content)
    model = "encoder" if task == "classification" and draw.random() < 0.5 else "model"
    words = ["--model", model, "--task", task, "--data", odd.name, "--steps", "1"]
    words += draw.choice([[], [], ["--no-shuffle"], ["--eval-split", "0.3"], ["--stream"]])
    return words + draw.choice([[], [], ["--length", "8"], ["--no-mask-prompt"], ["--batch", "1"]])


def of_configs(draw: random.Random, number: int) -> list[str]:
    """Return a damaged file of options, and some options beside it."""
    words = options.draw_words(draw)
    path = Path(f"odd{number}.yaml")
    path.write_bytes(configs.as_file(draw, words))
    more = draw.choice([[], [], ["--model", "model"], ["--data", "text.jsonl"]])
    return ["--config", str(path), *more]


SORTS: dict[str, Callable[[random.Random, int], list[str]]] = {
    "options": of_options,
    "data": of_data,
    "configs": of_configs,
}


class Campaign:
    """The runs so far.

    Args:
      seed: of all of them.
      twice: share of the successful runs that are repeated from a file, and of those of which an
        option is left out.
    """

    def __init__(self, seed: int, twice: float) -> None:
        self._seed, self._twice = seed, twice
        self.ends: Counter[str] = Counter()
        self.problems: list[str] = []
        self.idle: Counter[str] = Counter()

    def run(self, sort: str, number: int) -> check.Ended:
        """Make one run and look at its end."""
        draw = random.Random(f"{self._seed} {sort} {number}")
        words = ["train", *SORTS[sort](draw, number)]
        ended, out = self._train(words, "out")
        self.ends[f"{sort}: status {ended.status}"] += 1
        for problem in check.problems(ended, out):
            self._tell(sort, number, ended, problem)
        if ended.status == 0 and sort != "data":
            if draw.random() < self._twice:
                self._repeat(sort, number, ended)
            if draw.random() < self._twice and sort == "options":
                self._leave_out(draw, ended)
        return ended

    def _train(self, words: list[str], name: str) -> tuple[check.Ended, Path]:
        out = check.fresh(Path(name))
        cache = [] if "--compile-cache" in words else ["--compile-cache", "cache"]
        return check.run([*words, *cache, "--out", name]), out

    def _repeat(self, sort: str, number: int, ended: check.Ended) -> None:
        """Run the same from the file that --dump-config prints."""
        self.ends["repeated from --dump-config"] += 1
        dumped = check.run([*ended.words, "--dump-config"])
        Path("dumped.yaml").write_text(dumped.out)
        again, out = self._train(["train", "--config", "dumped.yaml"], "again")
        wanted, found = check.outcome(ended, Path("out")), check.outcome(again, out)
        different = [name for name in wanted if wanted[name] != found[name]]
        if different:
            self._tell(sort, number, again, f"--dump-config repeats another run: {different}")

    def _leave_out(self, draw: random.Random, ended: check.Ended) -> None:
        """Run without one of the options; where that makes no difference, count it."""
        words = [*ended.words[: ended.words.index("--steps")]]
        rest = [*ended.words[ended.words.index("--steps") + 2 :]]
        groups: list[list[str]] = []
        for word in rest:
            if word.startswith("--") or not groups:
                groups.append([word])
            else:
                groups[-1].append(word)
        own = [g for g in groups if g[0] not in ("--out", "--compile-cache")]
        if not own:
            return
        lost = draw.choice(own)
        left = [word for group in own if group is not lost for word in group]
        again, out = self._train([*words, "--steps", "2", *left], "without")
        self.ends["with an option left out"] += 1
        if check.outcome(ended, Path("out")) == check.outcome(again, out):
            self.idle[shlex.join(lost)] += 1

    def _tell(self, sort: str, number: int, ended: check.Ended, problem: str) -> None:
        self.problems.append(problem)
        print(f"{sort} {number}: {problem}\n  {ended.command}", flush=True)


def main() -> int:
    """Make the runs that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100, help="runs of each sort")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--sort", choices=[*SORTS], action="append")
    parser.add_argument("--only", type=int, help="the number of one run")
    parser.add_argument("--twice", type=float, default=0.2)
    given = parser.parse_args()
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time
    campaign = Campaign(given.seed, given.twice)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        world.build(Path())
        numbers = range(given.first, given.first + given.count)
        for number in numbers if given.only is None else [given.only]:
            for sort in given.sort or SORTS:
                ended = campaign.run(sort, number)
                if given.only is not None:
                    print(f"{ended.command}\n{ended.out}{ended.err}")
            if number % 20 == 19:
                jax.clear_caches()
        os.chdir("/")
    for end, count in sorted(campaign.ends.items()):
        print(f"{count:6} {end}")
    for option, count in campaign.idle.most_common():
        print(f"{count:6} without effect: {option}")
    print(f"{len(campaign.problems)} problems")
    return bool(campaign.problems)


if __name__ == "__main__":
    sys.exit(main())
