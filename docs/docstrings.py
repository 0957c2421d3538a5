"""Prepare docstrings for Markdown: doctests become code, and so do shapes such as [*batch, in]."""

import re

import griffe

#: A paragraph that begins with a prompt; outputs belong to it.
DOCTEST = re.compile(r"^( *)>>> .*(?:\n(?! *$).*)*", re.MULTILINE)

#: Text in backticks, or a shape outside of them, whose stars Markdown would take for emphasis.
CODE_OR_SHAPE = re.compile(r"(`[^`]*`)|(\[[^\]`\n]*\*[^\]`\n]*\])")

#: The head of the section, and the indentation of its text.
RETURNS = re.compile(r"(^ *Returns:\n +)", re.MULTILINE)


def for_markdown(text: str) -> str:
    """Return a docstring with its doctests in fences and its shapes in backticks."""
    parts, end = [], 0
    for match in DOCTEST.finditer(text):
        parts += [
            _quoted(text[end : match.start()]),
            f"{match[1]}```pycon\n{match[0]}\n{match[1]}```",
        ]
        end = match.end()
    return "".join([*parts, _quoted(text[end:])])


def _quoted(text: str) -> str:
    return CODE_OR_SHAPE.sub(lambda match: match[1] or f"`{match[2]}`", text)


class Docstrings(griffe.Extension):
    """Rewrite the docstring of every object that is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is None:
            return
        text = for_markdown(obj.docstring.value)
        if obj.is_function and obj.returns is not None:
            # Without a type, what is before the first colon of the text is taken for one.
            text = RETURNS.sub(rf"\1{obj.returns}: ", text)
        obj.docstring.value = text
