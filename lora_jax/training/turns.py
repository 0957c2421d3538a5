"""Which characters of a rendered conversation the assistant says."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

#: First and last character, exclusive, of a part of a text.
Span = tuple[int, int]
Messages = Sequence[Mapping[str, Any]]
ASSISTANT = "assistant"
_MARK = "\ue000"  # private: in place of what a message says, to see where the template writes it


def assistant_spans(messages: Messages, render: Callable[..., str]) -> tuple[str, list[Span]]:
    """Render a conversation up to the assistant's last turn, and find what the assistant says.

    A turn starts where the generation prompt ends, so the opening that generation is given does
    not count, and ends where the template starts the next turn. Where a template writes earlier
    turns in another way than the last one (some drop the reasoning from them), the turn is its
    content, with the end of the turn.

    Args:
      messages: the turns, with at least one of the role "assistant".
      render: `render(messages, add_generation_prompt=...)`, the chat template.

    Returns:
      The text, and one span per turn of the assistant, ascending.

    Raises:
      ValueError: the template leaves out a turn, or refuses the conversation.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
    messages = messages[: turns[-1] + 1]
    whole = render(messages, add_generation_prompt=False)
    spans: list[Span] = []
    for i in turns:
        start, end = _span(messages, i, whole, render)
        start = max(start, spans[-1][1] if spans else 0)
        spans.append((start, max(start, end)))
    return whole, spans


def _span(messages: Messages, i: int, whole: str, render: Callable[..., str]) -> Span:
    is_last = i + 1 == len(messages)
    asked = render(messages[:i], add_generation_prompt=True) if i else ""
    answered = whole if is_last else render(messages[: i + 1], add_generation_prompt=False)
    is_prefix = whole.startswith(asked) and answered.startswith(asked)
    if is_prefix:
        following = _followed(messages, render) if is_last else whole
        end = _end_of_turn(asked, answered, following)
        if end is not None or is_last:
            return len(asked), len(answered) if end is None else end
    start, content_end = _content(messages, i, whole, render)
    start = min(start, len(asked)) if is_prefix else _opened(messages, i, whole[:start], render)
    _, own_end = _content(messages[: i + 1], i, answered, render)
    closing, rest = answered[own_end:], whole[content_end:]
    common = _common(closing, rest)
    return start, content_end + (common if common == len(closing) else _boundary(closing, common))


def _opened(messages: Messages, i: int, text: str, render: Callable[..., str]) -> int:
    """Return where the generation prompt of a turn ends in the text before its content.

    That is the end of the text where the template writes something else there.
    """
    if not i:
        return len(text)
    plain, asked = (render(messages[:i], add_generation_prompt=x) for x in (False, True))
    opening = asked[_common(plain, asked) :]
    if opening and opening in text:
        end = text.rfind(opening) + len(opening)
        before = messages[i - 1].get("content")
        if not (isinstance(before, str) and before.strip() and before.strip() in text[end:]):
            return end  # and not that of an earlier turn
    return len(text)


def _end_of_turn(asked: str, answered: str, following: str | None) -> int | None:
    """Return where a turn ends that comes after `asked` in `answered`.

    Args:
      asked: the text up to the turn, with the generation prompt.
      answered: the text up to and with the turn.
      following: the same with a further message, or None if the template refuses that.

    Returns:
      None if it cannot be told. A template that always ends in the assistant's opening has it
      after the turn, too: there the turn ends before it.
    """
    if following is None or following.startswith(answered):
        return len(answered)
    end = _boundary(answered, _common(answered, following))
    return end if end > len(asked) and asked.endswith(answered[end:]) else None


def _followed(messages: Messages, render: Callable[..., str]) -> str | None:
    """Render the conversation and one more message of the user."""
    try:
        return render([*messages, {"role": "user", "content": _MARK}], add_generation_prompt=False)
    except ValueError:
        return None


def _boundary(text: str, end: int) -> int:
    """Return the last place up to `end` where one part of a template's text can end.

    >>> _boundary("</s><|assistant|>", 6), _boundary("### Assistant:", 5)
    (4, 0)
    """
    places = re.finditer(r"(?<=[\s>\]])|(?=[<\[])|$|^", text[: end + 1])
    end = max(place.start() for place in places if place.start() <= end)
    return len(re.sub(r"(?m)^[#* ]+\Z", "", text[:end]))


def _content(messages: Messages, i: int, text: str, render: Callable[..., str]) -> Span:
    """Return where `text`, the rendered messages, holds the content of one of them."""
    content = messages[i].get("content")
    mark = [{"type": "text", "text": _MARK}] if isinstance(content, list) else _MARK
    marked = [*messages[:i], {**messages[i], "content": mark}, *messages[i + 1 :]]
    other = render(marked, add_generation_prompt=False)
    if other == text:
        raise ValueError(
            f"the chat template rewrites earlier turns at messages[{i}]; give the row as prompt "
            "and completion"
        )
    start = _common(text, other)
    left, right = text[start:][::-1], other[start:][::-1]
    return start, len(text) - _common(left, right)


def _common(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(one), len(other)))
