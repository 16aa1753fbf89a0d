import io
from pathlib import Path

import numpy as np
import pytest
from phi3v_data.thumbnails import EDGES_PX, Plan, draw, draw_thumbnail, plan_thumbnails, spread
from PIL import Image


def noise(file: Path, width: int = 200, height: int = 150, seed: int = 0) -> str:
    """An image that does not compress."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return str(file)


@pytest.mark.parametrize(
    ("number", "limit", "positions"),
    [(8, 4, [0, 2, 4, 6]), (3, 8, [0, 1, 2]), (3, None, [0, 1, 2]), (5, 1, [0]), (0, 4, [])],
)
def test_spread_takes_even_positions(number: int, limit: int | None, positions: list[int]):
    assert spread(number, limit) == positions


def test_a_thumbnail_keeps_the_proportions_and_tells_the_size_of_the_image(tmp_path: Path):
    thumbnail = draw_thumbnail(noise(tmp_path / "a.png", 400, 100), 64)

    assert (thumbnail.width, thumbnail.height, thumbnail.problem) == (400, 100, "")
    assert Image.open(io.BytesIO(thumbnail.data)).size == (64, 16)
    assert Image.open(io.BytesIO(thumbnail.data)).format == "WEBP"


def test_a_small_image_is_not_enlarged(tmp_path: Path):
    thumbnail = draw_thumbnail(noise(tmp_path / "a.png", 20, 10), 64)
    assert Image.open(io.BytesIO(thumbnail.data)).size == (20, 10)


def test_a_turned_photo_stands_upright(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees
    Image.new("RGB", (80, 40)).save(tmp_path / "a.jpg", exif=exif)
    thumbnail = draw_thumbnail(str(tmp_path / "a.jpg"), 64)

    assert (thumbnail.width, thumbnail.height) == (40, 80)
    assert Image.open(io.BytesIO(thumbnail.data)).size == (32, 64)


def test_what_does_not_decode_has_a_problem_and_no_picture(tmp_path: Path):
    whole = Path(noise(tmp_path / "a.jpg")).read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no image")

    half, text = (draw_thumbnail(str(tmp_path / name), 64) for name in ("half.jpg", "text.jpg"))
    assert (half.width, half.height, half.data) == (200, 150, b"")
    assert "truncated" in half.problem
    assert (text.width, text.data) == (0, b"")
    assert "not an image" in text.problem


def test_the_plan_takes_the_largest_pictures_that_fit(tmp_path: Path):
    files = [noise(tmp_path / f"{i}.png", seed=i) for i in range(4)]
    of_edge = {
        edge: sum(len(thumbnail.data) for _, thumbnail in draw(files, edge)) for edge in (160, 128)
    }

    assert plan_thumbnails([files], 1e9) == Plan(EDGES_PX[0], None)
    assert plan_thumbnails([files], of_edge[160] * 1.1) == Plan(160, None)
    assert plan_thumbnails([files], of_edge[128] * 1.1 / 2) == Plan(128, 2)
    assert plan_thumbnails([files], 10) == Plan(EDGES_PX[-1], 1)


def test_without_images_there_is_a_plan_too():
    assert plan_thumbnails([[], []], 1000) == Plan(EDGES_PX[0], None)


def test_pictures_come_in_the_order_of_the_files(tmp_path: Path):
    files = [noise(tmp_path / f"{i}.png", 10 + i, 8, seed=i) for i in range(40)]
    drawn = list(draw(files, 64, num_workers=4))

    assert [file for file, _ in drawn] == files
    assert [thumbnail.width for _, thumbnail in drawn] == [10 + i for i in range(40)]
