"""The header parsers say what Pillow says, or nothing."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from phi3v_data.image_header import jpeg_header, png_header, read_header
from phi3v_data.images import ORIENTATION_TAG, ImageError, ImageInfo, probe_image
from PIL import Image, PngImagePlugin

ODD = Path(__file__).resolve().parents[3] / "shared" / "testdata" / "images_odd"


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION_TAG] = orientation
    return tags


def read(data: bytes) -> ImageInfo | None:
    return read_header(lambda start, count: data[start : start + count], len(data))


def chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def insert(data: bytes, kind: bytes, new: bytes) -> bytes:
    """A PNG with a chunk in front of the first one of `kind`."""
    place = data.index(kind) - 4
    return data[:place] + new + data[place:]


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_sizes_are_those_after_turning(format: str, orientation: int):
    data = encode(Image.new("RGB", (3, 2)), format, exif=exif(orientation))
    info = read(data)

    assert info == probe_image(data)
    assert info is not None
    assert (info.width, info.height) == ((2, 3) if 5 <= orientation <= 8 else (3, 2))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_modes_of_png_are_those_of_pillow(mode: str):
    data = encode(Image.new(mode, (5, 4)), "PNG")
    info = read(data)

    assert info == probe_image(data)
    assert info is not None
    assert info.mode == mode
    assert info.has_alpha == (mode in ("LA", "RGBA"))
    assert info.bits == (16 if mode == "I;16" else 8)


@pytest.mark.parametrize(("bits", "color"), [(16, 2), (16, 4), (16, 6), (2, 0), (4, 3)])
def test_bit_depths_that_pillow_does_not_write_are_read(bits: int, color: int):
    ihdr = struct.pack(">IIBBBBB", 7, 5, bits, color, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(6)) if color == 3 else b""
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + palette + pixels + chunk(b"IEND", b"")
    info = read(data)

    assert info == probe_image(data)
    assert info is not None
    assert info.bits == max(bits, 8)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("is_progressive", [False, True])
def test_modes_of_jpeg_are_those_of_pillow(mode: str, is_progressive: bool):
    data = encode(Image.new(mode, (40, 30)), "JPEG", progressive=is_progressive)
    info = read(data)

    assert info == probe_image(data)
    assert info is not None
    assert info.mode == mode


def test_a_colour_that_is_marked_as_transparent_is_alpha():
    info = read(encode(Image.new("RGB", (5, 4)), "PNG", transparency=(0, 0, 0)))

    assert info is not None
    assert (info.mode, info.has_alpha) == ("RGB", True)


def test_a_header_longer_than_the_first_read_is_read_on():
    profile = bytes(range(256)) * 600  # three segments of JPEG, one chunk of PNG that is compressed
    for format in ("JPEG", "PNG"):
        data = encode(Image.new("RGB", (5, 4)), format, icc_profile=profile)
        assert read(data) == probe_image(data)
    assert read(encode(Image.new("RGB", (5, 4)), "JPEG", icc_profile=profile)) is not None


def test_a_png_with_many_pixel_chunks_is_not_read_through():
    image = Image.effect_noise((300, 300), 90)
    data = encode(image, "PNG")
    pixels = zlib.compress(
        b"".join(b"\0" + image.crop((0, y, 300, y + 1)).tobytes() for y in range(300))
    )
    parts = b"".join(chunk(b"IDAT", pixels[i : i + 100]) for i in range(0, len(pixels), 100))
    data = data[:33] + parts + chunk(b"tEXt", b"Title\0late") + chunk(b"IEND", b"")
    positions: list[int] = []

    def read_at(start: int, count: int) -> bytes:
        positions.append(start)
        return data[start : start + count]

    assert read_header(read_at, len(data)) == probe_image(data)
    assert len(positions) < 8


@pytest.mark.parametrize(
    "late",
    [
        chunk(b"eXIf", exif(6).tobytes()[6:]),
        chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'),
    ],
)
@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
def test_an_orientation_anywhere_in_a_png_is_not_missed(late: bytes, before: bytes):
    data = insert(encode(Image.effect_noise((30, 20), 90), "PNG"), before, late)

    assert probe_image(data).orientation == 6
    assert read(data) in (None, probe_image(data))


def test_text_that_pillow_takes_for_more_than_text_is_left_to_it():
    plain = encode(Image.new("RGB", (5, 4)), "PNG")
    text = PngImagePlugin.PngInfo()
    text.add_text("transparency", "x")
    odd = encode(Image.new("RGB", (5, 4)), "PNG", pnginfo=text)

    assert read(plain) == probe_image(plain)
    assert read(odd) in (None, probe_image(odd))


def test_what_is_out_of_the_ordinary_is_no_verdict():
    png = encode(Image.new("RGB", (5, 4)), "PNG")
    jpeg = encode(Image.new("RGB", (5, 4)), "JPEG")
    animated = encode(
        Image.new("RGB", (5, 4)), "PNG", save_all=True, append_images=[Image.new("RGB", (5, 4), 9)]
    )
    wrong_sum = png[:29] + bytes(4) + png[33:]

    for data in (b"", b"GIF89a", png[:20], png[:-20], jpeg[:100], animated, wrong_sum):
        assert read(data) is None
    assert jpeg_header(png) is None
    assert png_header(jpeg) is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not ODD.is_dir(), reason="the shared odd images are not here")
def test_odd_images_are_read_as_pillow_reads_them():
    num_read = 0
    for path in sorted(path for path in ODD.rglob("*.*") if path.suffix != ".md"):
        data = path.read_bytes()
        info = read(data)
        if info is not None:
            num_read += 1
            assert info == probe_image(data), path

    assert num_read >= 35  # the rest is damaged, or neither JPEG nor PNG


SEEDS = [
    encode(Image.effect_noise((17, 9), 80).convert(mode), format, **options)
    for mode, format, options in [
        ("RGB", "JPEG", {"exif": exif(6)}),
        ("CMYK", "JPEG", {"progressive": True}),
        ("L", "JPEG", {"icc_profile": bytes(50)}),
        ("RGB", "PNG", {"exif": exif(8), "dpi": (72, 72)}),
        ("P", "PNG", {"transparency": 3}),
        ("RGBA", "PNG", {"icc_profile": bytes(50)}),
    ]
]

Edit = tuple[float, int, bytes]
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 12), st.binary(max_size=6)), min_size=1, max_size=4
)


def edited(data: bytes, edits: list[Edit]) -> bytes:
    """Bytes replaced: (where, as a part of the length; how many; by what)."""
    for where, count, new in edits:
        place = int(where * len(data))
        data = data[:place] + new + data[place + count :]
    return data


def with_right_sums(data: bytes) -> bytes:
    """A PNG whose chunks have the checksums of what they hold."""
    position = 8
    while position + 12 <= len(data):
        end = position + 8 + int.from_bytes(data[position : position + 4])
        if end + 4 > len(data):
            break
        sum = struct.pack(">I", zlib.crc32(data[position + 4 : end]))
        data = data[:end] + sum + data[end + 4 :]
        position = end + 4
    return data


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(SEEDS), EDITS, st.booleans())
def test_of_mutated_images_the_parsers_say_what_pillow_says_or_nothing(
    data: bytes, edits: list[Edit], has_right_sums: bool
):
    data = edited(data, edits)
    if has_right_sums and data.startswith(b"\x89PNG"):
        data = with_right_sums(data)
    info = read(data)
    if info is not None:
        try:
            assert info == probe_image(data)
        except ImageError as error:
            raise AssertionError(f"{info}, but Pillow: {error}") from error
