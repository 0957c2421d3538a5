"""A short storm of clients; `python -m tests.stress.storm` sends thousands."""

import sys

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from tests.stress.storm.check import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc"),
]


def test_nothing_is_lost_in_a_storm():
    report = run(300, seed=1)
    assert not report.problems, report.problems[:5]
    assert len(report.counts) > 15 and sum(report.counts.values()) == 300
