"""Which run trains in which slot, and for how long: worked out by hand."""

import json
import math

import pytest

from lora_jax.training.errors import TrainingError
from lora_jax.training.sweeping.comparison import DIVERGED, DONE, STOPPED
from lora_jax.training.sweeping.course import Course, milestones


def follow(course, score):
    """Run a course to its end: the slots of each stretch and its length, and how runs ended."""
    stretches, endings, steps = [], {}, 0
    while not course.is_over:
        if course.due:
            runs = {slot: course.slots[slot] for slot in course.due}
            judged = {slot: score(run, course.done[slot]) for slot, run in runs.items()}
            ended, _ = course.judge(judged)
            endings |= {runs[slot]: (steps, how) for slot, how in ended.items()}
            course = course.restored(json.loads(json.dumps(course.to_json())))
            continue
        stretches.append((tuple(course.slots), course.stretch))
        steps += course.stretch
        course.advance(course.stretch)
    return stretches, endings


def test_without_halving_all_runs_take_all_steps():
    stretches, endings = follow(Course.new(5, 2, steps=7), lambda run, step: run)
    assert stretches == [((0, 1), 7), ((2, 3), 7), ((4, None), 7)]
    assert endings == {0: (7, DONE), 1: (7, DONE), 2: (14, DONE), 3: (14, DONE), 4: (21, DONE)}


def test_halving_with_a_slot_for_each_run():
    """One of three goes on: nine runs, then three, then one; the lower the number the better."""
    stretches, endings = follow(Course.new(9, 9, 90, eta=3), lambda run, step: run)
    nobody = (None,) * 6
    assert stretches == [
        ((0, 1, 2, 3, 4, 5, 6, 7, 8), 10),
        ((0, 1, 2, *nobody), 20),
        ((0, None, None, *nobody), 60),
    ]
    assert endings[0] == (90, DONE)
    assert {run for run, end in endings.items() if end == (10, STOPPED)} == {3, 4, 5, 6, 7, 8}
    assert {run for run, end in endings.items() if end == (30, STOPPED)} == {1, 2}


def test_losers_give_their_slots_to_the_next():
    """Two slots, four runs; at step 2 the better of all that have come so far goes on."""
    scores = {0: 3.0, 1: 2.0, 2: 1.0, 3: 4.0}
    stretches, endings = follow(Course.new(4, 2, 4, eta=2), lambda run, step: scores[run])
    assert stretches == [
        ((0, 1), 2),  # 1 is the better of two
        ((2, 1), 2),  # 2 comes third and is the best, of three one is kept; 1 is done
        ((2, 3), 2),  # 3 is the fourth of four, of which two are kept; 2 is done
    ]
    assert endings == {0: (2, STOPPED), 1: (4, DONE), 2: (6, DONE), 3: (6, STOPPED)}


def test_a_run_that_diverged_never_goes_on():
    lost = Course.new(2, 2, 4, eta=2)
    _, endings = follow(lost, lambda run, step: math.inf)
    assert endings == {0: (2, DIVERGED), 1: (2, DIVERGED)}
    _, endings = follow(Course.new(1, 1, 4), lambda run, step: math.inf)
    assert endings == {0: (4, DIVERGED)}


def test_equal_scores():
    """Of runs that are equal, no more than their share goes on: the first ones."""
    _, endings = follow(Course.new(4, 4, 4, eta=2), lambda run, step: 1.0)
    assert [endings[run][1] for run in range(4)] == [DONE, DONE, STOPPED, STOPPED]


@pytest.mark.parametrize(
    ("steps", "runs", "eta", "expected"),
    [
        (100, 8, 2, [12, 25, 50, 100]),
        (100, 8, None, [100]),
        (100, 26, 3, [11, 33, 100]),  # 27 runs would make a third round
        (100, 27, 3, [4, 11, 33, 100]),
        (1, 9, 3, [1]),
        (3, 9, 3, [3]),  # one step says nothing
    ],
)
def test_milestones(steps, runs, eta, expected):
    assert milestones(steps, runs, eta) == expected


def test_mistakes():
    with pytest.raises(TrainingError, match="from 1 to the number of runs, 2, got 3"):
        Course.new(2, 3, 4)
    with pytest.raises(TrainingError, match="eta 3"):
        Course.new(2, 2, 4, eta=3)
