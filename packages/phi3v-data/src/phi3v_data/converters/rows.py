"""What the converters of annotated pictures share: a row, what can be wrong with one, and its text.

    for found in read_records(group):             # of json_records
        found      # Row(where="train.jsonl:17", fields={"id": 42953, …}, number=16)
        found      # or Rejected("bad_json", "train.jsonl:18: …")

    yield from convert_rows(read_records(group), make_sample)

A row that gives no sample costs no other: whatever reads or converts one raises `RowError`, and
`convert_rows` turns that into a `Rejected` with the row's place.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import xxhash
from numpy.typing import NDArray

from phi3v_data.converters import Rejected
from phi3v_data.schema import Sample

MIN_GROUP_BYTES = 1 << 14
MAX_GROUPS = 2048
"""Small groups of rows keep all processes busy and little to redo; their number stays bounded."""


class Placed(Protocol):
    """Something read from a file."""

    @property
    def where(self) -> str:
        """File name and place, to start messages with."""
        ...


P = TypeVar("P", bound=Placed)


@dataclass(frozen=True)
class Row:
    """One object of the file."""

    where: str
    """File name and place, to start messages with."""

    fields: dict[str, Any]
    """Its text is valid Unicode, and no key occurred twice."""

    number: int = 0
    """Its place in the file, from 0: of lines (blank ones count), or of elements."""


class RowError(ValueError):
    """A row gives no sample; becomes a `Rejected` with the row's place."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def group_bytes(path: Path) -> int:
    """About how many bytes of a file make one group of rows."""
    return max(MIN_GROUP_BYTES, path.stat().st_size // MAX_GROUPS)


def convert_rows(
    found: Iterable[P | Rejected], make: Callable[[P], Sample]
) -> Iterator[Sample | Rejected]:
    """Yield the sample that `make` makes of each row, or why there is none."""
    for row in found:
        if isinstance(row, Rejected):
            yield row
            continue
        try:
            yield make(row)
        except RowError as error:
            yield Rejected(error.reason, f"{row.where}: {error.detail}")


def parse_row(line: bytes) -> dict[str, Any]:
    """One line as an object.

    Raises:
        RowError: it is none (`bad_utf8`, `bad_json`, `not_object`, `duplicate_key`), or holds text
            that no UTF-8 file can (`bad_unicode`).
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        detail = f"byte 0x{line[error.start]:02x} at {error.start} is not UTF-8"
        raise RowError("bad_utf8", detail) from None
    try:
        value: object = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RowError:
        raise
    except (ValueError, RecursionError) as error:
        raise RowError("bad_json", f"not a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise RowError("not_object", f"expected an object, got {type(value).__name__}")
    if "\\u" in text:  # only an escape can give half a surrogate pair
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            detail = "an escape gives half of a surrogate pair, which is no character"
            raise RowError("bad_unicode", detail) from None
    return cast("dict[str, Any]", value)


def text_field(row: Row, key: str) -> str:
    """The text under `key`.

    Raises:
        RowError: it is missing, blank, or no text (`bad_row`), or holds a special token of the
            model, which would end a turn or open another (`special_token`).
    """
    from phi3v_data.rules import IMAGE_MARK, SPECIAL_TOKEN

    value = row.fields.get(key)
    if not isinstance(value, str) or not value.strip():
        raise RowError("bad_row", f"expected text under {key!r}, got {value!r:.80}")
    token = SPECIAL_TOKEN.search(value) or IMAGE_MARK.search(value)
    if token:
        raise RowError("special_token", f"{key!r} holds {token[0]!r}, a special token of the model")
    return value


_BREAKING = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def name_problem(name: str) -> str:
    """What forbids a file's name in a sample or a message, to follow it there; empty if nothing.

    Any script is fine, and so are dashes, quotes and spaces. What would break a line, steer a
    terminal, or is no text (a name that is not UTF-8) is not.
    """
    found = _BREAKING.search(name)
    if found is None:
        return ""
    is_text = not "\ud800" <= found[0] <= "\udfff"
    return "holds control characters or line breaks" if is_text else "is not UTF-8"


def show_name(name: str) -> str:
    r"""A file's name for messages: what `name_problem` forbids is written as `\n` or `\udce9`.

    Two names stay two: a backslash is written twice.
    """
    return re.sub(
        rf"\\|{_BREAKING.pattern}",
        lambda found: found[0].encode("unicode_escape").decode(),
        name,
    )


def canonical_id(value: object) -> str | None:
    """An id as text, numbers without leading zeros, so that `7`, `"7"` and `"00007"` are one.

    None for what is no id: an empty text, a fraction, a truth value, or a number below zero.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    text = str(value)
    if text.isascii() and text.isdigit():
        return text.lstrip("0") or "0"
    return text if isinstance(value, str) and text else None


class SeenIds:
    """Hashes of ids met so far, 8 bytes each: sorted arrays, each more than twice the next.

    Two of ten million different ids share one of these hashes with a chance of 3 in a million.
    """

    def __init__(self) -> None:
        self._levels: list[NDArray[np.uint64]] = []

    def add(self, identities: Sequence[str | None]) -> int:
        """Add some ids; return a number whose bit k is set where the k-th was met before."""
        positions = [k for k, identity in enumerate(identities) if identity is not None]
        hashes = [xxhash.xxh3_64_intdigest(i.encode()) for i in identities if i is not None]
        new = np.array(hashes, dtype=np.uint64)
        is_new = np.zeros(len(new), dtype=bool)
        is_new[np.unique(new, return_index=True)[1]] = True
        for level in self._levels:
            places = np.searchsorted(level, new).clip(max=len(level) - 1)
            is_new &= level[places] != new
        fresh = np.sort(new[is_new])
        while self._levels and len(self._levels[-1]) <= 2 * len(fresh):
            fresh = np.concatenate([self._levels.pop(), fresh])
            fresh.sort()
        if len(fresh):
            self._levels.append(fresh)
        return sum(1 << positions[k] for k in np.flatnonzero(~is_new).tolist())


def _refuse_constant(name: str) -> None:
    raise RowError("bad_json", f"not a JSON object: {name} is no number in JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RowError("duplicate_key", f"the key {twice!r:.80} occurs twice")
    return found
