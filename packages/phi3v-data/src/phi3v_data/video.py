"""Video to frames: which ones (pure arithmetic) and how to decode them exactly.

    frame_indices(164, 8)                        # (0, 20, 41, 61, 82, 102, 123, 143)
    frame_indices(164, 8, "center")              # (10, 30, 51, 71, 92, 112, 133, 153)
    frames = read_frames("clip.avi", 8)          # 8 arrays (height, width, 3), uint8, BGR
    jpeg = encode_jpeg(frames[0], quality=75)    # the very bytes that PIL writes
    jpegs = read_jpegs("clip.avi", 8)            # both at once; memory holds one frame

**Frames are those of a full sequential decode, always.** Nothing seeks: re-encoded UCF-101 clips
have one key frame and timestamps that run backwards, and seeking there returns other frames.
Unwanted frames are decoded but not converted to pixels, by one decoder thread (several cost 1.5 to
2 times the CPU for clips of this size; processes scale better).

**Packets are left out where that cannot matter.** OpenCV hands out none, so MPEG-4 in AVI, which is
what UCF-101 is, is first cut down to those that the wanted frames need (`avi.py` says when that is
proven), and the cut is decoded from start to end. Where the decoder finds damage in it, or other
frames than planned, all of the file is decoded after all; so it is where FFmpeg's complaints cannot
be heard (`ffmpeg_log.py`). Of all other files every packet is decoded: without them neither the
count of frames nor where a group of pictures begins is certain.

**The number of frames is the number that decode.** A header is a guess: HMDB51 clips claim one
frame more than they hold, WebM states none. The first pass picks frames by the header's count and
decodes to the end; where that count proves wrong, a second pass picks by the true one.

**A cut-off file is told by its container, not by that count.** AVI, MP4 and Matroska say how long
their picture data is; a file that ends before it is `truncated`, however many of its frames decode.
A file that lost only its index is whole. Other containers declare nothing: what decodes, counts.

**Orientation** flags of phones are applied. A frame whose data is damaged in the middle of a file
looks as FFmpeg conceals it (which can differ from one run to the next).

The one module that imports OpenCV.
"""

import io
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from phi3v_data.avi import Movie, read_movie
from phi3v_data.ffmpeg_log import find_watch

# Read by OpenCV at import and at every open. Decoder chatter would tear the progress bar, and a
# file is judged by what decodes. A text file named .avi must not make FFmpeg open what it names
# (playlists, concat scripts, URLs): containers only, local files only.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
os.environ.setdefault(
    "OPENCV_FFMPEG_CAPTURE_OPTIONS",
    "protocol_whitelist;file|format_whitelist;avi,mov,matroska,mpeg,mpegvideo,mpegts,flv,asf,ogg",
)

import cv2

Frame = npt.NDArray[np.uint8]
"""(height, width, 3), blue first."""

T = TypeVar("T")

Sampling = Literal["uniform", "center", "random"]
"""Which frame stands for each of n equal stretches of a clip: its first (`uniform`), its middle one
(`center`), or one drawn from it (`random`)."""

Short = Literal["repeat", "fewer", "reject"]
"""What a clip with fewer frames than wanted gives: some frames twice, in order (`repeat`); each of
its frames once (`fewer`); an error (`reject`)."""


class VideoError(ValueError):
    """A file gives no usable frames.

    Attributes:
        reason: `unreadable`, `truncated`, `no_frames`, `too_short` or `unencodable`.
        detail: what was found, in words.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def frame_indices(
    num_frames_in_clip: int, num_frames: int, sampling: Sampling = "uniform", seed: str = ""
) -> tuple[int, ...]:
    """Where to look, ascending: one frame in each of n equal stretches of a clip of N frames.

    Stretch i = 0 … n-1 begins at `floor(i * N / n)`, in integers (float ranges drift). `uniform`
    takes that frame, `center` is `floor((2 * i + 1) * N / (2 * n))`, and `random` draws one of the
    stretch by hashing `seed` and i: the same on every machine and version of Python.

    With N < n the indices repeat, in order.
    """
    if num_frames_in_clip < 1 or num_frames < 1:
        raise ValueError(
            f"expected at least one frame to pick from and one to pick, "
            f"got {num_frames_in_clip} and {num_frames}"
        )
    starts = [i * num_frames_in_clip // num_frames for i in range(num_frames + 1)]
    if sampling == "uniform":
        return tuple(starts[:-1])
    if sampling == "center":
        return tuple(
            (2 * i + 1) * num_frames_in_clip // (2 * num_frames) for i in range(num_frames)
        )
    return tuple(
        start + _draw(f"{i} {seed}", max(1, stop - start))
        for i, (start, stop) in enumerate(pairwise(starts))
    )


def read_frames(
    path: str | os.PathLike[str],
    num_frames: int,
    *,
    short: Short = "repeat",
    sampling: Sampling = "uniform",
    seed: str = "",
) -> list[Frame]:
    """Decode `num_frames` frames of a video file; memory holds only those.

    Args:
        path: a local video file.
        num_frames: how many frames to return.
        short: what to do with a clip that has fewer.
        sampling: which frames; see `frame_indices`.
        seed: what `random` draws from.

    Raises:
        VideoError: the file is not a video, is cut off, has no frames, or is too short
            where `short` is `reject`.
    """
    return _read(Path(path), num_frames, short, sampling, seed, lambda frame: frame)


def read_jpegs(
    path: str | os.PathLike[str],
    num_frames: int,
    *,
    short: Short = "repeat",
    sampling: Sampling = "uniform",
    seed: str = "",
    quality: int = 75,
    max_side: int | None = None,
) -> list[bytes]:
    """`read_frames`, `shrink` and `encode_jpeg`, frame by frame: memory holds one frame's pixels.

    Raises:
        VideoError: as `read_frames` and `encode_jpeg`.
    """

    def encode(frame: Frame) -> bytes:
        return encode_jpeg(frame if max_side is None else shrink(frame, max_side), quality)

    return _read(Path(path), num_frames, short, sampling, seed, encode)


def shrink(frame: Frame, max_side: int) -> Frame:
    """Scale a frame down so that its longer side is `max_side` pixels; never up.

    The shorter side is rounded to the nearest pixel, at least 1. Pixels are averaged by area.
    """
    height, width = frame.shape[:2]
    longer = max(height, width)
    if longer <= max_side:
        return frame
    size_wh = [max(1, (2 * side * max_side + longer) // (2 * longer)) for side in (width, height)]
    return np.asarray(cv2.resize(frame, size_wh, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def encode_jpeg(frame: Frame, quality: int = 75) -> bytes:
    """Encode one frame (BGR) as baseline JPEG with 4:2:0 chroma, as PIL does by default."""
    height, width = frame.shape[:2]
    if max(height, width) > 65_500:  # the limit of libjpeg
        raise VideoError("unencodable", f"a frame of {width}x{height} pixels does not fit in JPEG")
    done, data = cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done, f"imencode refused a frame of shape {frame.shape}"
    return data.tobytes()


def missing_bytes(path: str | os.PathLike[str]) -> int:
    """How many bytes of its declared picture data a container lacks at the end of the file.

    0 for a whole file and for one that does not say.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(12)
        if head[:4] == b"RIFF":
            end = _end_of_avi(file, size)
        elif head[4:8] == b"ftyp":
            end = _end_of_mp4(file, size)
        elif head[:4] == b"\x1a\x45\xdf\xa3":
            end = _end_of_matroska(file)
        else:
            end = 0
    return max(0, end - size)


def _draw(seed: str, below: int) -> int:
    digest = blake2b(seed.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % below


def _read(
    path: Path,
    num_frames: int,
    short: Short,
    sampling: Sampling,
    seed: str,
    keep: Callable[[Frame], T],
) -> list[T]:
    """What `keep` makes of each wanted frame, in order."""
    path = path.absolute()  # FFmpeg takes the colon of a relative `a:b.avi` for a URL
    if not path.is_file():  # a pipe would be waited for
        raise VideoError("unreadable", "it does not exist or is no regular file")
    try:
        missing = missing_bytes(path)
    except PermissionError:
        raise VideoError("unreadable", "no permission to read it") from None
    if missing:
        raise VideoError("truncated", f"the file ends {missing:,} bytes before its video data does")

    def wanted(count: int) -> tuple[int, ...]:
        number = min(count, num_frames) if short == "fewer" else num_frames
        return frame_indices(count, number, sampling, seed)

    movie = read_movie(path)
    if movie is not None and not (short == "reject" and movie.num_frames < num_frames):
        kept = _decode_cut(movie, wanted(movie.num_frames), keep)
        if kept is not None:
            return [kept[index] for index in wanted(movie.num_frames)]
    claimed, count, kept = _decode(path, wanted, keep, None)
    if count == 0:
        raise VideoError("no_frames", f"no frame decodes (the header claims {claimed})")
    if count < num_frames and short == "reject":
        raise VideoError("too_short", f"{count} frames, {num_frames} wanted")
    if not set(wanted(count)) <= kept.keys():
        _, recount, kept = _decode(path, wanted, keep, count)
        if recount != count:
            raise VideoError("unreadable", f"decoded {count} frames, then {recount}")
    return [kept[index] for index in wanted(count)]


def _decode_cut(
    movie: Movie, wanted: Sequence[int], keep: Callable[[Frame], T]
) -> dict[int, T] | None:
    """What is kept of the wanted by index.

    None where a decoder meets damage, which it conceals by what it saw before, or finds other
    frames than planned.
    """
    watch = find_watch(Path(cv2.__file__))
    if watch is None:
        return None
    cut = movie.cut(wanted)
    kept: dict[int, T] = {}
    try:
        with _open(io.BytesIO(cut.content)) as capture:
            num_complaints = watch.count_complaints()
            for index in cut.indices:
                if not capture.grab():
                    return None
                if index in wanted:
                    kept[index] = keep(_retrieve(capture, index))
            is_as_planned = not capture.grab() and watch.count_complaints() == num_complaints
    except VideoError:
        return None  # the full decode is the one to say so
    return kept if is_as_planned else None


def _decode(
    path: Path,
    wanted: Callable[[int], tuple[int, ...]],
    keep: Callable[[Frame], T],
    count: int | None,
) -> tuple[int, int, dict[int, T]]:
    """One sequential pass: (frames claimed, frames decoded, what is kept of the wanted by index).

    `count` says how many frames there are; None takes the header's word.
    """
    with _open(path) as capture:
        claimed = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        assumed = claimed if count is None else count
        indices = frozenset(wanted(assumed)) if assumed > 0 else frozenset[int]()
        kept: dict[int, T] = {}
        index = 0
        while capture.grab():
            if index in indices:
                kept[index] = keep(_retrieve(capture, index))
            index += 1
    return claimed, index, kept


@contextmanager
def _open(source: Path | io.BytesIO) -> Generator[cv2.VideoCapture]:
    """One decoder thread; what OpenCV raises becomes a VideoError."""
    # `source` must outlive the capture, which reads it but does not hold it.
    capture = cv2.VideoCapture()
    is_path = isinstance(source, Path)
    name = os.fsencode(source).decode(errors="replace") if is_path else source
    try:
        # The stubs know C++'s reader only; Python's may be any object that reads and seeks.
        opened = bool(capture.open(name, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1]))  # pyright: ignore[reportCallIssue, reportArgumentType, reportUnknownArgumentType]
        if not opened:
            is_empty = is_path and source.stat().st_size == 0
            what = "the file is empty" if is_empty else "not a video FFmpeg knows"
            raise VideoError("unreadable", what)
        capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
        yield capture
    except cv2.error as error:
        raise VideoError("unreadable", str(error).strip().splitlines()[-1]) from None
    finally:
        capture.release()


def _retrieve(capture: cv2.VideoCapture, index: int) -> Frame:
    done, frame = capture.retrieve()
    if not done:
        raise VideoError("unreadable", f"frame {index} has no pixels")
    return np.asarray(frame, dtype=np.uint8)


def _end_of_avi(file: BinaryIO, size: int) -> int:
    """Where the last `movi` list ends; large files have several RIFF chunks in a row."""
    end = start = 0
    while start + 12 <= size:
        file.seek(start)
        head = file.read(8)
        length = int.from_bytes(head[4:], "little")
        if head[:4] != b"RIFF" or length in (0, 0xFFFFFFFF):  # trailing bytes, or never finished
            break
        stop = min(start + 8 + length, size)
        position = start + 12
        while position + 12 <= stop:
            file.seek(position)
            chunk = file.read(12)
            chunk_length = int.from_bytes(chunk[4:8], "little")
            if chunk[:4] == b"LIST" and chunk[8:] == b"movi":
                end = position + 8 + chunk_length if chunk_length != 0xFFFFFFFF else 0
                break
            position += 8 + chunk_length + chunk_length % 2
        start += 8 + length + length % 2
    return end


def _end_of_mp4(file: BinaryIO, size: int) -> int:
    """Where the last `mdat` box ends."""
    end = position = 0
    while position + 8 <= size:
        file.seek(position)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:], "big")
        if length < 8:  # 0: to the end of the file; else not a box
            break
        if head[4:8] == b"mdat":
            end = position + length
        position += length
    return end


def _end_of_matroska(file: BinaryIO) -> int:
    """Where the Segment ends; 0 where its size is unknown, as in a live recording."""
    file.seek(4)
    header_length = _read_vint(file)
    if header_length is None:
        return 0
    file.seek(header_length, os.SEEK_CUR)
    if file.read(4) != b"\x18\x53\x80\x67":
        return 0
    length = _read_vint(file)
    return 0 if length is None else file.tell() + length


def _read_vint(file: BinaryIO) -> int | None:
    """An EBML number: as many leading zero bits as bytes follow; all ones means unknown."""
    first = file.read(1)
    if not first or first[0] == 0:
        return None
    num_more = 8 - first[0].bit_length()
    mask = (1 << (7 * (num_more + 1))) - 1
    value = int.from_bytes(first + file.read(num_more), "big") & mask
    return None if value == mask else value
