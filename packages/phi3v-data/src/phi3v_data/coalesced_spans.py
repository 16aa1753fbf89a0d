"""Which requests fetch the spans of a row: near ones together.

coalesce([(4, 900), (912, 700), (9_000_000, 50)])
# (Request(4, 1608, spans=(0, 1)), Request(9000000, 50, spans=(2,)))
"""

from collections.abc import Sequence
from typing import NamedTuple

MAX_GAP_BYTES = 512 * 1024
"""Spans with at most this between them are fetched in one request. A store answers after 20 to
50 ms and then sends some 50 MB/s to a connection: bytes nobody asked for take 10 ms, the shortest
wait for another answer takes twice that."""

MAX_REQUEST_BYTES = 32 * 1024 * 1024
"""A request grows no further than this (one span may be longer): what is cut is sent once more."""


class Request(NamedTuple):
    """A range of a file, and which spans lie in it."""

    offset: int
    length: int
    """Bytes, more than 0."""
    spans: tuple[int, ...]
    """Numbers of the spans, in order of their offset."""


def coalesce(
    spans: Sequence[tuple[int, int]],
    max_gap_bytes: int = MAX_GAP_BYTES,
    max_request_bytes: int = MAX_REQUEST_BYTES,
) -> tuple[Request, ...]:
    """Requests that cover all spans, in order of their offset; empty spans are in none.

    Args:
        spans: (offset, length) in bytes, in any order; they may touch and overlap.
        max_gap_bytes: between two spans of one request.
        max_request_bytes: beyond it a span begins a new request, unless it lies in the last one.
    """
    found: list[Request] = []
    numbers = sorted((k for k, span in enumerate(spans) if span[1]), key=lambda k: spans[k])
    for k in numbers:
        offset, length = spans[k]
        if found:
            last = found[-1]
            end = max(offset + length, last.offset + last.length)
            is_near = offset - last.offset - last.length <= max_gap_bytes
            is_within = end == last.offset + last.length
            if is_within or (is_near and end - last.offset <= max_request_bytes):
                found[-1] = Request(last.offset, end - last.offset, (*last.spans, k))
                continue
        found.append(Request(offset, length, (k,)))
    return tuple(found)
