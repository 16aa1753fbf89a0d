"""Damaged images by the thousand: a verdict on each, in no time, and never `ok` where it is not."""

import io
import struct
import time
import warnings
from pathlib import Path

import pytest
from phi3v_data.image_check import ImageCheck, Level, check_bytes
from phi3v_data.images import FORMATS
from PIL import Image

from .image_mutator import ImageMutator, make_seeds
from .peak_memory import run_measured

MOST_SECONDS = 1.0
"""For one image, whatever it claims to be."""

MOST_MB = 600
"""For a process that checks them all, whatever they claim to be."""


def check_timed(data: bytes, level: Level) -> ImageCheck:
    started = time.thread_time()
    check = check_bytes(data, level)
    seconds = time.thread_time() - started
    assert seconds < MOST_SECONDS, f"{level}: {seconds:.1f} s: {check}"
    return check


def pillow_refuses(data: bytes) -> str:
    """Why a full decode by Pillow fails; empty where it does not."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
    except Exception as error:  # of nearly any type
        return f"{type(error).__name__}: {error}"
    return ""


def look_at(data: bytes) -> ImageCheck:
    """Check one image, and what must hold of any."""
    check = check_timed(data, "deep")
    header = check_timed(data, "header")
    assert check.kind in ("ok", "undecodable")
    assert check.num_bytes == len(data)
    if check.kind == "ok":
        assert not (refusal := pillow_refuses(data)), f"{refusal}: {check}"
        assert header.kind == "ok"
        assert header.info == check.info
    else:
        assert check.problem
        assert "\n" not in check.problem
        if check.cause != "too_large" and "32-bit" not in check.problem:
            # Pillow may have read it, and stumbled where it is turned or converted: rare.
            assert pillow_refuses(data) or check_bytes(data, "full").kind != "ok"
    return check


def fuzz(number: int, seed: int, folder: Path) -> None:
    """Look at so many damaged images here; then in a process whose memory is measured."""
    mutator = ImageMutator(seed)
    (folder / "images").mkdir()
    kinds = {"ok": 0, "undecodable": 0}
    for k in range(number):
        data = mutator.next()
        try:
            kinds[look_at(data).kind] += 1
        except BaseException:
            (folder / "failing").write_bytes(data)  # pytest names the folder
            raise
        (folder / "images" / f"{k:05}").write_bytes(data)
    assert min(kinds.values()) > number // 10, kinds
    script = """
        import sys, warnings
        from pathlib import Path
        from phi3v_data.image_check import check_image
        warnings.simplefilter("ignore")
        root = Path(sys.argv[1])
        for path in sorted(root.iterdir()):
            check_image(root, path.name, "deep")
        print(int(peak_mb()))
        """
    assert int(run_measured(script, folder / "images")) < MOST_MB


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of what it finds odd
        yield


def test_the_seeds_are_whole():
    for data in make_seeds():
        assert look_at(data).kind == "ok"


def test_500_damaged_images_get_the_verdict_they_deserve(tmp_path: Path):
    fuzz(500, 11, tmp_path)


@pytest.mark.slow
def test_20000_damaged_images_get_the_verdict_they_deserve(tmp_path: Path):
    fuzz(20_000, 12, tmp_path)


def encode(image: Image.Image, format: str, **options: object) -> bytearray:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return bytearray(buffer.getvalue())


def bomb(format: str) -> bytes:
    """A small file whose header promises 13,000 x 13,000 pixels, below the limit."""
    side = 13_000
    small = Image.new("L" if format == "GIF" else "RGB", (64, 48))
    if format == "WEBP":
        data = encode(small, "WEBP", lossless=True)
        (flags,) = struct.unpack_from("<I", data, 21)  # width - 1, height - 1: 14 bits each
        size = (side - 1) | (side - 1) << 14
        struct.pack_into("<I", data, 21, (flags >> 28 << 28) | size)
        return bytes(data)
    data = encode(small, format, **({"progressive": True} if format == "JPEG" else {}))
    if format == "JPEG":
        struct.pack_into(">HH", data, data.index(b"\xff\xc2") + 5, side, side)
    else:
        struct.pack_into("<HH", data, 6, side, side)
    return bytes(data)


@pytest.mark.parametrize("level", ["header", "deep", "full"])
@pytest.mark.parametrize("format", ["JPEG", "GIF", "WEBP"])
def test_a_small_file_of_many_pixels_is_refused_before_it_is_decoded(format: str, level: Level):
    data = bomb(format)
    check = check_timed(data, level)

    assert (check.kind, check.cause) == ("undecodable", "too_large")
    assert check.problem == (
        f"does not decode: 13000x13000 pixels in a file of {len(data)} bytes: a decompression bomb"
    )


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_a_large_empty_page_is_no_bomb(format: str):
    options = {"compression": "group4"} if format == "TIFF" else {}
    page = Image.new("L" if format == "JPEG" else "1", (4960, 7016), 255 if format == "JPEG" else 1)
    data = bytes(encode(page, format, **options))  # A4 at 600 dpi

    assert check_bytes(data, "deep").kind == "ok"
