"""A few writers killed at random moments; `python -m tests.stress.killed_writers` kills more."""

import sys

import pytest

from tests.stress.killed_writers import check, writers

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")


DEFAULT = ("native file", "PEFT directory")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(x, marks=() if x in DEFAULT else pytest.mark.slow) for x in writers.KINDS],
)
def test_killed_while_saving(kind, tmp_path):
    assert check.saves(kind, tmp_path / "saved", count=6, seed=1) == []


@pytest.mark.slow
def test_killed_while_training(tmp_path):
    assert check.training(tmp_path, count=5, seed=1) == ([], 5)
