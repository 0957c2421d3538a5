"""Columns of the data under other names than the keys of the rows: `--field text=question`."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lora_jax.core.foreign import shown
from lora_jax.training.errors import DataError
from lora_jax.training.rows.forms import KNOWN, OPTIONAL, form_of


@dataclass(frozen=True)
class Fields:
    """Which columns stand for which keys.

    Attributes:
      columns: a key of a row, and the column that it is read from. Another column with the name of
        such a key is left out, and so are other keys of rows if they would say something else.
    """

    columns: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, texts: Iterable[str]) -> "Fields":
        """Return the fields that texts such as "text=question" name.

        Raises:
          DataError: a text has another form, names a key that rows do not have, or one twice.

        >>> Fields.parse(["prompt=question", "completion=answer"]).rename({"question": "Why?"})
        Traceback (most recent call last):
        ValueError: has no 'answer', which --field completion=answer names
        """
        found: dict[str, str] = {}
        for text in texts:
            key, mark, column = (part.strip() for part in text.partition("="))
            keys = sorted(KNOWN | OPTIONAL)
            if not mark or not column:
                raise DataError(f"--field {shown(text)}: write KEY=COLUMN, such as text=question")
            if key not in keys:
                close = difflib.get_close_matches(key, keys, 1) or keys
                raise DataError(
                    f"--field {shown(text)}: {shown(repr(key))} is not a key of rows; use "
                    f"{', '.join(close)} on the left of ="
                )
            if key in found:
                raise DataError(f"--field {shown(text)}: {key} is read from {found[key]} already")
            found[key] = column
        return cls(tuple(found.items()))

    @property
    def names(self) -> frozenset[str]:
        """The names of the columns that are read."""
        return frozenset(column for _, column in self.columns)

    def column(self, key: str) -> str:
        """Return the name of the column that a key is read from."""
        return dict(self.columns).get(key, key)

    def rename(self, row: Any) -> Any:
        """Return a row under the keys of rows.

        Raises:
          ValueError: it does not have one of the columns, and the key is not an optional one.
        """
        if not self.columns or not isinstance(row, dict):
            return row
        keys = {key for key, _ in self.columns}
        new = {name: x for name, x in row.items() if name not in keys and name not in self.names}
        for key, column in self.columns:
            if column in row:
                new[key] = row[column]
            elif key not in OPTIONAL:
                given = f"--field {key}={shown(column)}"
                raise ValueError(f"has no {shown(repr(column))}, which {given} names")
        if form_of(new) is None:  # columns that are named say what a row is
            new = {name: x for name, x in new.items() if name in keys or name not in KNOWN}
        return new


UNCHANGED = Fields()
