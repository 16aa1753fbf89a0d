import io
import struct
from pathlib import Path

import pytest
from phi3v_data.images import (
    MAX_PIXELS,
    ORIENTATION_TAG,
    ImageError,
    ImageInfo,
    TooManyPixelsError,
    decode_image,
    formats_of_extension,
    probe_image,
    upright_rgb,
)
from PIL import Image, PngImagePlugin

ODD = Path(__file__).resolve().parents[3] / "shared" / "testdata" / "images_odd"

REFUSED = {
    "libvips/truncated.jpg",
    "pillow/broken.png",
    "pillow/broken_data_stream.png",
    "pillow/decompression_bomb.gif",
    "pillow/png_decompression_dos.png",
    "pillow/truncated_end_chunk.png",
    "pillow/truncated_image.png",
    "pillow/truncated_jpeg.jpg",
    "pillow/unknown_compression_method.png",
    "pillow/zero_width.gif",
    "torchvision/corrupt34_2.jpg",
    "torchvision/sigsegv.png",
}


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION_TAG] = orientation
    return tags


# Red in the top left corner of a 3x2 picture as it should be seen; each entry stores it turned.
STORED_AS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright_and_probe_agrees(orientation: int, format: str):
    seen = Image.new("RGB", (3, 2))
    seen.putpixel((0, 0), (255, 0, 0))
    turn = STORED_AS[orientation]
    stored = seen if turn is None else seen.transpose(turn)
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(stored, format, exif=exif(orientation), **options)

    image, info = decode_image(data), probe_image(data)

    assert image.size == (info.width, info.height) == (3, 2)
    assert image.getpixel((0, 0)) == (255, 0, 0)
    assert (info.orientation, info.format) == (orientation, format)


def test_an_orientation_after_the_pixels_of_a_png_counts():
    data = encode(Image.new("RGB", (3, 2)), "PNG", exif=exif(6))
    start = data.index(b"eXIf") - 4
    length = 12 + int.from_bytes(data[start : start + 4])
    end = data.index(b"IEND") - 4
    late = data[:start] + data[start + length : end] + data[start : start + length] + data[end:]

    assert probe_image(late).width == decode_image(late).width == 2


def test_alpha_is_dropped_not_blended():
    data = encode(Image.new("RGBA", (2, 2), (10, 20, 30, 0)), "PNG")

    assert decode_image(data).getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparency_decodes_without_a_warning():
    image = Image.new("P", (2, 2))
    image.putpalette([10, 20, 30, 40, 50, 60])
    data = encode(image, "PNG", transparency=b"\x00\xff")

    assert decode_image(data).getpixel((1, 1)) == (10, 20, 30)


def test_sixteen_bits_keep_their_high_byte():
    image = Image.new("I;16", (2, 1))
    image.putpixel((0, 0), 0x80FF)
    image.putpixel((1, 0), 0xFFFF)
    decoded = decode_image(encode(image, "PNG"))

    assert decoded.getpixel((0, 0)) == (0x80, 0x80, 0x80)
    assert decoded.getpixel((1, 0)) == (255, 255, 255)


def grey_tiff(samples: bytes, width: int, bits: int, photometric: int) -> bytes:
    """A TIFF of one row, written by hand: Pillow writes neither 12 bits nor negatives."""
    LONG, SHORT = 4, 3
    tags = [(256, LONG, width), (257, LONG, 1), (258, SHORT, bits), (259, SHORT, 1)]
    tags += [(262, SHORT, photometric), (273, LONG, 8), (278, LONG, 1), (279, LONG, len(samples))]
    body = b"".join(struct.pack("<HHII", tag, type, 1, value) for tag, type, value in tags)
    header = struct.pack("<2sHI", b"II", 42, 8 + len(samples))
    return header + samples + struct.pack("<H", len(tags)) + body + bytes(4)


def test_twelve_bit_tiffs_keep_their_high_byte():
    decoded = decode_image(grey_tiff(bytes.fromhex("000400FFF80F"), 4, bits=12, photometric=1))

    assert [decoded.getpixel((x, 0)) for x in range(4)] == [
        (0, 0, 0),
        (0x40, 0x40, 0x40),
        (0xFF, 0xFF, 0xFF),
        (0x80, 0x80, 0x80),
    ]


@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_that_is_stored_as_a_negative_is_turned_to_white_is_white(bits: int):
    samples = bytes([0, 0x40, 0xFF]) if bits == 8 else struct.pack("<3H", 0, 0x4000, 0xFFFF)
    decoded = decode_image(grey_tiff(samples + bytes(len(samples) % 2), 3, bits, photometric=0))

    assert [decoded.getpixel((x, 0)) for x in range(3)] == [
        (255, 255, 255),
        (0xBF, 0xBF, 0xBF),
        (0, 0, 0),
    ]


def test_the_image_a_caller_holds_keeps_its_transparency():
    data = encode(Image.new("L", (2, 2), 7), "PNG", transparency=7)
    image = Image.open(io.BytesIO(data))

    assert upright_rgb(image).getpixel((0, 0)) == (7, 7, 7)
    assert image.info["transparency"] == 7


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_pixels_are_refused_since_nothing_says_what_white_is(mode: str):
    with pytest.raises(ImageError, match="no defined white level"):
        decode_image(encode(Image.new(mode, (2, 2)), "TIFF"))


def test_the_first_frame_of_an_animation_is_the_picture():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])

    assert decode_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_a_truncated_file_passes_the_probe_and_fails_the_decode():
    data = encode(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")[:-200]

    assert probe_image(data).width == 64
    with pytest.raises(ImageError, match="truncated"):
        decode_image(data)


def test_a_damaged_pixel_chunk_of_a_png_is_found():
    data = bytearray(encode(Image.effect_noise((64, 64), 50), "PNG"))
    data[len(data) // 2] ^= 1
    with pytest.raises(ImageError):
        decode_image(bytes(data))


def test_a_bomb_is_refused_from_its_header():
    width, height = 1 << 16, MAX_PIXELS // (1 << 16) + 1
    data = b"P6 %d %d 255\n" % (width, height)
    for read in (probe_image, decode_image):
        with pytest.raises(TooManyPixelsError, match="more than"):
            read(data)


def test_a_format_that_would_start_another_program_is_not_read():
    with pytest.raises(ImageError, match="not an image in a format that is read"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_counts_as_none():
    data = encode(Image.new("RGB", (3, 2)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")

    assert probe_image(data).orientation == 1
    assert decode_image(data).size == (3, 2)


def test_memoryviews_and_paths_are_read_too(tmp_path: Path):
    data = encode(Image.new("RGB", (3, 2)), "PNG", pnginfo=PngImagePlugin.PngInfo())
    (tmp_path / "a.png").write_bytes(data)

    assert probe_image(tmp_path / "a.png") == probe_image(memoryview(data))
    assert decode_image(memoryview(data)).size == (3, 2)


@pytest.mark.parametrize(
    ("image", "format", "options", "bits", "has_alpha"),
    [
        (Image.new("RGB", (3, 2)), "PNG", {}, 8, False),
        (Image.new("1", (3, 2)), "PNG", {}, 8, False),
        (Image.new("I;16", (3, 2)), "PNG", {}, 16, False),
        (Image.new("I;16", (3, 2)), "TIFF", {}, 16, False),
        (Image.new("I;16", (3, 2)), "PPM", {}, 16, False),
        (Image.new("F", (3, 2)), "TIFF", {}, 16, False),
        (Image.new("RGBA", (3, 2)), "PNG", {}, 8, True),
        (Image.new("RGBA", (3, 2)), "TIFF", {}, 8, True),
        (Image.new("LA", (3, 2)), "PNG", {}, 8, True),
        (Image.new("RGBA", (3, 2)), "WEBP", {}, 8, True),
        (Image.new("P", (3, 2)), "GIF", {"transparency": 0}, 8, True),
        (Image.new("L", (3, 2)), "PNG", {"transparency": 0}, 8, True),
        (Image.new("CMYK", (3, 2)), "JPEG", {}, 8, False),
    ],
)
def test_depth_and_transparency_are_read(
    image: Image.Image, format: str, options: dict[str, int], bits: int, has_alpha: bool
):
    info = probe_image(encode(image, format, **options))

    assert info == ImageInfo(3, 2, info.mode, format, 1, bits, has_alpha)


def test_sixteen_bits_of_colour_are_read_from_the_maximum_of_a_ppm():
    assert probe_image(b"P6 1 1 65535\n" + bytes(6)).bits == 16
    assert probe_image(b"P6 1 1 255\n" + bytes(3)).bits == 8


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_more_than_one_frame_is_told(format: str):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]

    assert not probe_image(encode(frames[0], format)).is_animated
    data = encode(frames[0], format, save_all=True, append_images=frames[1:])
    assert probe_image(data).is_animated


def test_an_extension_promises_formats():
    assert "JPEG" in formats_of_extension("a/b.JPG")
    assert formats_of_extension("noextension") == ()


@pytest.mark.filterwarnings("error")
@pytest.mark.skipif(not ODD.is_dir(), reason="the shared odd images are not here")
def test_every_odd_image_gets_the_verdict_of_a_full_decode():
    refused: set[str] = set()
    paths = [path for path in sorted(ODD.rglob("*")) if path.is_file() and path.suffix != ".md"]
    for path in paths:
        data = path.read_bytes()
        try:
            image = decode_image(data)
        except ImageError:
            refused.add(path.relative_to(ODD).as_posix())
        else:
            info = probe_image(data)
            assert (info.width, info.height) == image.size, path

    assert refused == REFUSED
    assert len(paths) > 60
