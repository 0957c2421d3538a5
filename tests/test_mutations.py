"""A few damaged files; `python -m tests.mutations` damages as many as one likes."""

import pytest

from tests.mutations import check
from tests.mutations.subjects import FORMATS


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_files_give_clear_errors_or_finite_values(format, quick_compile):
    tally = check.run(seed=7, numbers=range(60), formats=[format])
    assert tally.problems == []
    assert tally.outcomes[format, "clear error"] > 30
    assert sum(tally.outcomes.values()) == 60 > tally.outcomes[format, "clear error"]
