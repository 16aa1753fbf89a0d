"""Where a JSON pointer leads in a line: the characters to underline.

line = b'{"id": "a", "conversations": [{"user": "u"}]}'
span(line, "/conversations/0/user")       # (39, 42): "u" with its quotes
span(line, "/conversations/0/assistant")  # (30, 43): not there; the object that lacks it
token(line.decode(), 1)                   # (1, 5): "id", what begins at a character
"""

import re

from phi3v_data.json_line import find_place

Span = tuple[int, int]
"""First character, from 0, and the one after the last."""

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[-+.\w]+')


def span(line: bytes, pointer: str) -> Span:
    """The characters of the value `pointer` leads to.

    A key that is not there: its object, or the nearest value around it that is. A line that is
    not JSON up to there: all of it.
    """
    text = line.decode("utf-8", "replace")
    place = find_place(text, pointer)
    return place.value if place else (0, len(text))


def key_span(line: bytes, pointer: str) -> Span | None:
    """The characters of the key that `pointer` ends in, quotes included; None if not there."""
    place = find_place(line.decode("utf-8", "replace"), pointer)
    return place.key if place and place.is_exact else None


def token(text: str, start: int) -> Span:
    """The string, number or word that begins at `start`, else that one character."""
    match = _TOKEN.match(text, start)
    if match:
        return match.span()
    return (start, min(start + 1, len(text)))
