"""Show doctests in the API reference as code: Markdown would take `>>>` for a quotation."""

import re

import griffe

#: A paragraph that begins with a prompt; outputs belong to it.
DOCTEST = re.compile(r"^( *)>>> .*(?:\n(?! *$).*)*", re.MULTILINE)


class DoctestBlocks(griffe.Extension):
    """Put a fence around each doctest of a docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Rewrite the docstring of a loaded object."""
        if obj.docstring is not None:
            obj.docstring.value = DOCTEST.sub(r"\1```pycon\n\g<0>\n\1```", obj.docstring.value)
