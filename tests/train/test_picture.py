import base64
import io
from pathlib import Path

import numpy as np
import pytest
from phi3v_train.picture import read_picture
from PIL import Image


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def test_every_form_gives_the_same_picture(picture: Image.Image, tmp_path: Path) -> None:
    data = png(picture)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    expected = np.asarray(picture)
    for source in (
        picture,
        expected,
        data,
        bytearray(data),
        memoryview(data),
        path,
        str(path),
        "data:image/png;base64," + base64.b64encode(data).decode(),
    ):
        assert np.array_equal(np.asarray(read_picture(source)), expected)


def test_any_mode_becomes_rgb(picture: Image.Image) -> None:
    assert read_picture(picture.convert("L")).mode == "RGB"
    assert read_picture(picture.convert("RGBA")).mode == "RGB"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("nowhere/a.jpg", r"cannot read the image nowhere/a\.jpg: .*No such file"),
        (b"not an image", "cannot read the image of 12 bytes: not an image"),
        ("data:image/png;base64,!", "cannot read the image data:image/png;base64,!"),
        (np.zeros((4, 4), np.uint8), r"cannot read the image array: expected uint8 \(H, W, 3\)"),
        (np.zeros((4, 4, 3), np.float32), r"expected uint8 \(H, W, 3\), got float32"),
        ("http://127.0.0.1/a b.jpg", "cannot read the image http://127.0.0.1/a b.jpg: "),
        (17, "an image is a PIL image, .*got int"),
    ],
)
def test_what_is_no_picture_is_one_clear_error(source: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_picture(source)  # pyright: ignore[reportArgumentType]


def test_a_truncated_file_is_named(picture: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    path.write_bytes(png(picture.resize((200, 200)))[:500])
    with pytest.raises(ValueError, match=r"cannot read the image .*cut\.png"):
        read_picture(path)


def test_a_picture_taken_for_a_path_does_not_fill_the_screen() -> None:
    with pytest.raises(ValueError, match="cannot read the image") as caught:
        read_picture("QUJD" * 10_000)
    assert len(str(caught.value)) < 1000
