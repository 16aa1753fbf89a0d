"""Numbers of lines, a bit each: fifty million lines are six megabytes.

lines = LineSet()
lines.add(17)
lines.update(np.array([3, 4]))
list(lines), 4 in lines, len(lines)     # [3, 4, 17], True, 3
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

CHUNK_BYTES = 1 << 16
"""Looked through at once."""


class LineSet:
    """A set of numbers from 0."""

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        self._bits = np.zeros(64, dtype=np.uint8)
        for number in numbers:
            self.add(number)

    def add(self, number: int) -> None:
        """Put a number in."""
        self._reach(number)
        self._bits[number >> 3] |= 1 << (number & 7)

    def update(self, numbers: "np.ndarray[Any, np.dtype[np.int64]]") -> None:
        """Put many numbers in."""
        if len(numbers):
            self._reach(int(numbers.max()))
            bits = np.left_shift(1, numbers & 7).astype(np.uint8)
            np.bitwise_or.at(self._bits, numbers >> 3, bits)

    def merge(self, other: "LineSet") -> None:
        """Put in what another set has."""
        if len(other._bits) > len(self._bits):
            self._reach(8 * len(other._bits) - 1)
        self._bits[: len(other._bits)] |= other._bits

    def __contains__(self, number: object) -> bool:
        if not isinstance(number, int) or not 0 <= number < 8 * len(self._bits):
            return False
        return bool(self._bits[number >> 3] >> (number & 7) & 1)

    def __len__(self) -> int:
        return int(np.bitwise_count(self._bits).sum())

    def __iter__(self) -> Iterator[int]:
        """The numbers, ascending."""
        for start in range(0, len(self._bits), CHUNK_BYTES):
            part = np.unpackbits(self._bits[start : start + CHUNK_BYTES], bitorder="little")
            yield from (np.flatnonzero(part) + 8 * start).tolist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LineSet) and list(self) == list(other)

    __hash__ = None  # pyright: ignore[reportAssignmentType]: it changes

    def __repr__(self) -> str:
        return f"LineSet({len(self)} numbers)"

    def _reach(self, number: int) -> None:
        if number >= 8 * len(self._bits):
            bigger = np.zeros(max(2 * len(self._bits), (number >> 3) + 1), dtype=np.uint8)
            bigger[: len(self._bits)] = self._bits
            self._bits = bigger
