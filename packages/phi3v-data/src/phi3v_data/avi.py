"""MPEG-4 video in AVI, cut down to the packets that some frames need.

    movie = read_movie("v_Biking_g05_c02.avi")   # 201 frames, a key frame every 12
    cut = movie.cut([0, 25, 50])                 # an AVI file in memory: 18 packets
    cut.indices                                  # (0, 24, 25, 48, 49, 50): what it decodes to

A decoder that reads `cut.content` from start to end makes the very pictures that it makes of these
frames when it reads the whole file, and has less to do. That follows from the packets' order where
their headers leave no doubt; `read_movie` gives None where they do, and the caller decodes all:

- one AVI list of packets that fills its declared size, MPEG-4 of the usual makers, no other codec;
- every header is whole: a decoder drops a picture whose header is not, and the count goes wrong;
- the stream begins with its settings and a key frame; where settings come again they are the same;
- key frames begin at nothing (an I picture), P refers to the I or P before it, B to the two before
  it. So without B pictures, what a frame needs begins at its key frame. With them, times matter,
  which count from the start: all I and P are kept, and of B those that are wanted;
- "packed" files (DivX: P and B in one packet, a placeholder later) balance out.

The first packet is always kept: it names the encoder, for whose habits decoders have workarounds.

What this cannot see is damage inside a picture, behind a whole header: the decoder of the cut does.
"""

import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

MAX_BYTES = 1 << 26
"""Larger files are not looked at: the whole one is held in memory."""

_FOURCCS = (b"XVID", b"DIVX", b"DX50", b"FMP4", b"MP4V")
_VOP = b"\0\0\1\xb6"
"""Starts a picture; what follows is its header."""

_GROUP = re.compile(rb"\x00\x00\x01\xb3.{3,5}?(?=\x00\x00\x01)", re.DOTALL)
"""A group's header sets the clock, which matters to B pictures only."""

_I, _P, _B = 0, 1, 2
_SIMPLE, _ADVANCED_SIMPLE = 1, 17
"""Types of object whose pictures have the header parsed here."""

_MAX_SECONDS = 20
"""Since the last picture's; with more, a header may not fit in the 64 bits looked at."""

_EIGHT_BYTES = struct.Struct(">Q")

_PLACEHOLDER_BYTES = 19
"""A packet of at most this size that holds an empty picture ends a packed group."""


@dataclass(frozen=True)
class Cut:
    """Some packets of a movie."""

    content: bytes
    """An AVI file."""

    indices: tuple[int, ...]
    """Which frames of the whole movie it decodes to, ascending."""


class _Picture(NamedTuple):  # there are many: a third of a frozen dataclass's time
    kind: int
    start: int
    """Where its packet (or its part of one) begins in the file."""
    stop: int


@dataclass(frozen=True)
class Movie:
    """The pictures of a file whose packets are understood."""

    content: bytes
    """The file."""
    stream_header: bytes
    """The stream's `strl` list."""
    pictures: tuple[_Picture, ...]
    """In the order they are decoded."""
    shown: tuple[int, ...]
    """Frame → picture: the order they are shown in."""

    @property
    def num_frames(self) -> int:
        """How many frames a full decode gives."""
        return len(self.shown)

    def cut(self, frames: Sequence[int]) -> Cut:
        """Keep what is needed for `frames`, and the first packet."""
        wanted = {self.shown[frame] for frame in frames}
        kinds = [picture.kind for picture in self.pictures]
        needed = {0}
        if _B in kinds:
            needed |= wanted | {k for k, kind in enumerate(kinds) if kind != _B}
        else:
            for last in wanted:
                k = last
                while k not in needed:
                    needed.add(k)
                    if kinds[k] == _I:
                        break
                    k -= 1
        view = memoryview(self.content)
        packets = [view[p.start : p.stop] for k, p in enumerate(self.pictures) if k in needed]
        indices = tuple(frame for frame, k in enumerate(self.shown) if k in needed)
        return Cut(_make_avi(self.stream_header, packets), indices)


def read_movie(path: str | os.PathLike[str]) -> Movie | None:
    """Understand a file's packets, or give None where something is out of the ordinary."""
    if Path(path).stat().st_size > MAX_BYTES:
        return None
    content = Path(path).read_bytes()
    try:
        return _parse(content)
    except (_Unclear, struct.error, IndexError):
        return None


class _Unclear(Exception):
    """The packets do not prove what a decoder makes of them."""


def _parse(content: bytes) -> Movie:
    number, stream_header, claimed, packets = _parse_avi(content)
    names = b"%02ddc" % number, b"%02ddb" % number
    pictures: list[_Picture] = []
    settings = b""
    clock: _Clock | None = None
    has_groups = is_packed = is_pending = (
        False  # pending: a picture of a packed group waits in the decoder
    )
    for name, start, stop in packets:
        if name not in names:
            if name[:2] == names[0][:2]:
                raise _Unclear
            continue
        first = start if content[start : start + 4] == _VOP else content.find(_VOP, start, stop)
        if first < 0:
            raise _Unclear
        if first > start:
            prefix, num_groups = _GROUP.subn(b"", content[start : first + 3])
            has_groups |= num_groups > 0
            if clock is None:
                settings = prefix
                clock = _Clock(_parse_settings(settings))
                is_packed = b"DivX" in settings  # without it, decoders take one picture of a packet
            elif len(prefix) > 3 and prefix != settings:
                raise _Unclear
        if clock is None:
            raise _Unclear
        second = content.find(_VOP, first + 4, stop) if is_packed else -1
        kind = clock.read(content, first + 4)
        if kind is None:
            if not is_pending or second >= 0 or stop - start > _PLACEHOLDER_BYTES:
                raise _Unclear
            is_pending = False
            continue
        if (is_pending and (kind != _B or second >= 0)) or (not pictures and kind != _I):
            raise _Unclear
        pictures.append(_Picture(kind, start, stop if second < 0 else second))
        if second >= 0:
            third = content.find(_VOP, second + 4, stop)
            if third >= 0 or clock.read(content, second + 4) != _B:
                raise _Unclear
            pictures.append(_Picture(_B, second, stop))
            is_pending = True
    if is_pending:  # the end of the file takes it along
        pictures.pop()
    kinds = [picture.kind for picture in pictures]
    if len(pictures) != claimed or clock is None:
        raise _Unclear
    if _B in kinds and (has_groups or not clock.settings.has_b):
        raise _Unclear
    return Movie(content, stream_header, tuple(pictures), tuple(_show(kinds)))


def _show(kinds: Sequence[int]) -> Iterator[int]:
    """A picture that others refer to is shown when the next such comes, B at once."""
    held: int | None = None
    for k, kind in enumerate(kinds):
        if kind == _B:
            yield k
        else:
            if held is not None:
                yield held
            held = k
    if held is not None:
        yield held


# --- pictures' headers ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Settings:
    """What a video object layer says that matters for reading pictures' headers."""

    ticks: int
    """Per second."""
    is_interlaced: bool
    has_b: bool
    """Says that pictures may be shown in another order than decoded."""


class _Bits:
    """Bits of the settings, most significant first."""

    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data, "big")
        self._left = 8 * len(data)

    def take(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise _Unclear
        return self._value >> self._left & (1 << count) - 1

    def expect(self, value: int, count: int = 1) -> None:
        if self.take(count) != value:
            raise _Unclear


def _parse_settings(settings: bytes) -> _Settings:
    """The one layer header (start code 0x20 to 0x2f) in what precedes the first picture."""
    codes: list[int] = []
    position = settings.find(b"\0\0\1")
    layer = -1
    while 0 <= position < len(settings) - 3:
        code = settings[position + 3]
        codes.append(code)
        if 0x20 <= code <= 0x2F:
            layer = position + 4
        position = settings.find(b"\0\0\1", position + 3)
    if sum(0x20 <= code <= 0x2F for code in codes) != 1:
        raise _Unclear
    bits = _Bits(settings[layer : layer + 64] + bytes(8))
    bits.take(1)
    if bits.take(8) not in (_SIMPLE, _ADVANCED_SIMPLE):
        raise _Unclear
    version = 1
    if bits.take(1):
        version = bits.take(4)
        bits.take(3)
    if bits.take(4) == 15:  # its own pixel aspect
        bits.take(16)
    has_b = False
    if bits.take(1):
        bits.take(2)
        has_b = not bits.take(1)
        if bits.take(1):
            bits.take(79)
    bits.expect(0, 2)  # rectangular
    bits.expect(1)
    ticks = bits.take(16)
    bits.expect(1)
    if not ticks:
        raise _Unclear
    if bits.take(1):
        bits.take(max(1, (ticks - 1).bit_length()))
    for _ in range(2):  # width, height
        bits.expect(1)
        bits.take(13)
    bits.expect(1)
    is_interlaced = bool(bits.take(1))
    bits.expect(1)  # no overlapped compensation
    bits.expect(0, 1 if version == 1 else 2)  # no sprite
    bits.expect(0)  # 8 bits
    if bits.take(1):  # quantiser matrices
        for _ in range(2):
            if bits.take(1):
                for _ in range(64):
                    if not bits.take(8):
                        break
    if version != 1:
        bits.take(1)  # quarter pixel
    bits.expect(1)  # no complexity estimation
    bits.take(2)
    if version != 1:
        bits.expect(0, 2)  # neither new prediction nor reduced resolution
    bits.expect(0)  # no scalability
    return _Settings(ticks, is_interlaced, has_b)


class _Clock:
    """Reads pictures' headers in the order of decoding; B pictures must lie between their two."""

    def __init__(self, settings: _Settings) -> None:
        self.settings = settings
        self._num_time_bits = max(1, (settings.ticks - 1).bit_length())
        self._all_ticks = (1 << self._num_time_bits) - 1
        self._marks = 1 << self._num_time_bits + 2 | 2
        self._num_bits_to_quantiser = (5 if settings.is_interlaced else 3) + 5
        self._second = 0
        self._second_before = 0
        self._time = 0
        self._distance = 0
        self._num_references = 0

    def read(self, content: bytes, start: int) -> int | None:
        """The kind of the picture whose header begins at `start`; None where it is empty."""
        # All in one integer: a clip has hundreds of these, and its pictures cost little more.
        header: int = _EIGHT_BYTES.unpack_from(content, start)[0]
        kind = header >> 62
        left = 61
        num_seconds = 0
        while header >> left & 1:
            num_seconds += 1
            left -= 1
        left -= self._num_time_bits + 3
        marks = header >> left
        if num_seconds > _MAX_SECONDS or kind > _B or marks & self._marks != self._marks:
            raise _Unclear
        if not marks & 1:
            return None
        ticks = marks >> 2 & self._all_ticks
        left -= self._num_bits_to_quantiser + (kind == _P)
        if not header >> left & 31:
            raise _Unclear
        for _ in range(kind):  # ranges of motion: none in I, one in P, two in B
            left -= 3
            if not header >> left & 7:
                raise _Unclear
        if kind == _B:
            time = (self._second_before + num_seconds) * self.settings.ticks + ticks
            after = self._distance - (self._time - time)
            if self._num_references < 2 or not 0 < after < self._distance:
                raise _Unclear
        else:
            self._second_before = self._second
            self._second += num_seconds
            time = self._second * self.settings.ticks + ticks
            self._distance = time - self._time
            self._time = time
            self._num_references += 1
        return kind


# --- the container --------------------------------------------------------------------------------

_Chunk = tuple[bytes, int, int]
"""Name, start and stop of the contents."""


def _parse_avi(content: bytes) -> tuple[int, bytes, int, Iterator[_Chunk]]:
    """(video stream's number, its `strl` list, frames it claims, packets of all streams)."""
    if content[:4] != b"RIFF" or content[8:12] != b"AVI ":
        raise _Unclear
    lists: dict[bytes, tuple[int, int]] = {}
    for name, start, stop in _walk(content, 12, 8 + _length(content, 4)):
        if name == b"LIST":
            kind = content[start : start + 4]
            if kind in lists:
                raise _Unclear
            lists[kind] = start + 4, stop
    if not {b"hdrl", b"movi"} <= lists.keys():
        raise _Unclear
    videos: list[tuple[int, bytes, int]] = []
    streams = [
        (start, stop)
        for name, start, stop in _walk(content, *lists[b"hdrl"])
        if name == b"LIST" and content[start : start + 4] == b"strl"
    ]
    for number, (start, stop) in enumerate(streams):
        parts = {name: (at, end) for name, at, end in _walk(content, start + 4, stop)}
        if not {b"strh", b"strf"} <= parts.keys():
            raise _Unclear
        header, settings = parts[b"strh"][0], parts[b"strf"][0]
        if content[header : header + 4] == b"vids":
            if content[settings + 16 : settings + 20].upper() not in _FOURCCS:
                raise _Unclear
            # `indx` tells of packets elsewhere: it is not copied, nor needed beside one list.
            strl = b"".join(
                _make_chunk(name, content[at:end])
                for name, (at, end) in parts.items()
                if name not in (b"indx", b"JUNK")
            )
            videos.append((number, strl, _length(content, header + 32)))
    if len(videos) != 1:
        raise _Unclear
    number, strl, claimed = videos[0]
    return number, strl, claimed, _walk(content, *lists[b"movi"])


def _length(content: bytes, position: int) -> int:
    return struct.unpack_from("<I", content, position)[0]


def _walk(content: bytes, start: int, stop: int) -> Iterator[_Chunk]:
    if stop > len(content):
        raise _Unclear
    while start + 8 <= stop:
        name, length = struct.unpack_from("<4sI", content, start)
        if start + 8 + length > stop:
            raise _Unclear
        yield name, start + 8, start + 8 + length
        start += 8 + length + length % 2


def _make_chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


def _make_avi(stream_header: bytes, packets: Sequence[memoryview]) -> bytes:
    """One stream, numbered 0, without an index."""
    main = struct.pack("<14I", 40_000, 0, 0, 0, len(packets), 0, 1, 0, 0, 0, 0, 0, 0, 0)
    headers = b"hdrl" + _make_chunk(b"avih", main)
    headers = _make_chunk(b"LIST", headers + _make_chunk(b"LIST", b"strl" + stream_header))
    length = 4 + sum(8 + len(packet) + len(packet) % 2 for packet in packets)
    head = struct.pack("<4sI4s", b"RIFF", 4 + len(headers) + 8 + length, b"AVI ")
    parts: list[bytes | memoryview] = [
        head,
        headers,
        struct.pack("<4sI4s", b"LIST", length, b"movi"),
    ]
    for packet in packets:
        parts += struct.pack("<4sI", b"00dc", len(packet)), packet, bytes(len(packet) % 2)
    return b"".join(parts)
