"""Numbers with their nouns."""


def count(number: int, noun: str) -> str:
    """Return a number and its noun, in the plural if need be.

    >>> count(1, "row"), count(2_000, "step")
    ('1 row', '2,000 steps')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
