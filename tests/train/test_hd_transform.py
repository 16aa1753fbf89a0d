from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phi3v_train.hd_transform import (
    CROP,
    MAX_FAST_STEPS,
    hd_crops,
    hd_image,
    hd_layout,
    num_image_tokens,
)
from PIL import Image
from safetensors.numpy import load_file

from tests.train.parity import PARITY, needs_parity, read_json

# width, height, num_crops, padded (height, width), tokens; from the reference's recorded sizes.
KNOWN = [
    (336, 336, 1, (336, 336), 313),
    (640, 480, 4, (672, 672), 757),
    (480, 640, 4, (672, 672), 757),
    (640, 480, 16, (1008, 1344), None),
    (1000, 333, 4, (336, 1008), 601),
    (337, 1, 4, (336, 1344), 745),
]


@pytest.mark.parametrize(("width", "height", "num_crops", "size_hw", "num_tokens"), KNOWN)
def test_sizes_are_the_published_ones(
    width: int, height: int, num_crops: int, size_hw: tuple[int, int], num_tokens: int | None
) -> None:
    layout = hd_layout(width, height, num_crops)
    assert layout.canvas_hw == size_hw
    if num_tokens is not None:
        assert layout.num_tokens == num_tokens


@needs_parity
def test_every_recorded_size_holds() -> None:
    recorded = read_json("processor/sizes.json")
    rows = recorded["rows"] + [r for r in recorded["extreme_ratio_rows"] if r["error"] is None]
    for row in rows:
        layout = hd_layout(row["width"], row["height"], row["num_crops"])
        assert list(layout.canvas_hw) == row["image_size_hw"], row
        assert layout.num_tokens == row["num_img_tokens"], row
    for row in recorded["extreme_ratio_rows"]:
        if row["error"] is not None:
            with pytest.raises(ValueError, match="too long and thin"):
                hd_layout(row["width"], row["height"], row["num_crops"])


@needs_parity
def test_every_cell_of_the_size_grid_holds() -> None:
    grid = load_file(PARITY / "processor/size_grid.safetensors")
    axis = grid["axis"].tolist()
    for name, sizes in grid.items():
        if name == "axis":
            continue
        num_crops = int(name.rpartition("_")[2])
        for i, width in enumerate(axis):
            for j, height in enumerate(axis):
                expected = sizes[i, j].tolist()
                if 0 in expected:
                    with pytest.raises(ValueError, match="too long and thin"):
                        hd_layout(width, height, num_crops)
                else:
                    assert list(hd_layout(width, height, num_crops).canvas_hw) == expected


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 16))
def test_a_layout_fits_its_crops(width: int, height: int, num_crops: int) -> None:
    try:
        layout = hd_layout(width, height, num_crops)
    except ValueError:
        assert max(width, height) > 336 * min(width, height)
        return
    rows, columns = layout.grid
    assert rows * columns <= num_crops
    assert layout.resized_hw[0] <= layout.canvas_hw[0]
    assert layout.resized_hw[1] <= layout.canvas_hw[1]
    assert layout.num_tokens == num_image_tokens(rows, columns)
    turned = hd_layout(height, width, num_crops)
    assert turned.grid == (columns, rows)


def cut_crops(canvas: np.ndarray) -> np.ndarray:
    """The tiles of a canvas (H, W, 3), row by row, channels first."""
    tiles = [
        canvas[y : y + CROP, x : x + CROP].transpose(2, 0, 1)
        for y in range(0, canvas.shape[0], CROP)
        for x in range(0, canvas.shape[1], CROP)
    ]
    return np.stack(tiles)


def test_crops_are_the_tiles_of_the_canvas_row_by_row() -> None:
    image = Image.new("RGB", (1008, 672))
    image.paste("red", (336, 336, 672, 672))
    crops = hd_crops(image, 6)
    assert crops.shape == (6, 3, CROP, CROP)
    is_red = [(crop[0] == 255).all() and (crop[1:] == 0).all() for crop in crops]
    assert is_red == [False, False, False, False, True, False]


def test_the_padding_is_white_and_the_picture_lies_in_the_middle() -> None:
    canvas = hd_image(Image.new("RGB", (640, 480)), 4)
    assert (canvas[:84] == 255).all()
    assert (canvas[84:588] == 0).all()
    assert (canvas[588:] == 255).all()


# Landscape, portrait and square; shrunk and enlarged; padded on both sides, on one, and not at all.
SHAPES = [
    (640, 480, 4),
    (480, 640, 4),
    (640, 480, 16),
    (850, 1100, 16),
    (336, 336, 1),
    (50, 50, 16),
    (337, 20, 4),
    (3, 400, 9),
    (671, 672, 4),
]


def noise(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width * height)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def published_hd_image(image: Image.Image, num_crops: int) -> np.ndarray:
    """The published steps: a portrait is transposed, resized in one call, and transposed back."""
    is_portrait = image.height > image.width
    if is_portrait:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    layout = hd_layout(image.width, image.height, num_crops)
    (height, width), (rows, columns) = layout.resized_hw, layout.grid
    canvas = Image.new("RGB", (columns * CROP, rows * CROP), "white")
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    canvas.paste(resized, (0, layout.top_left[0]))
    return np.asarray(canvas.transpose(Image.Transpose.TRANSPOSE) if is_portrait else canvas)


@pytest.mark.parametrize(("width", "height", "num_crops"), SHAPES)
def test_crops_are_those_of_the_published_steps_bit_for_bit(
    width: int, height: int, num_crops: int
) -> None:
    image = noise(width, height)
    canvas = published_hd_image(image, num_crops)
    assert np.array_equal(hd_image(image, num_crops), canvas)
    crops = hd_crops(image, num_crops)
    assert np.array_equal(crops, cut_crops(canvas))
    assert crops.flags.c_contiguous
    assert crops.flags.writeable


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 16))
def test_crops_of_any_shape_are_the_tiles_of_its_canvas(
    width: int, height: int, num_crops: int
) -> None:
    image = noise(width, height)
    try:
        canvas = published_hd_image(image, num_crops)
    except ValueError:
        with pytest.raises(ValueError, match="too long and thin"):
            hd_crops(image, num_crops)
        return
    assert np.array_equal(hd_crops(image, num_crops), cut_crops(canvas))


@needs_parity
def test_crops_of_the_recorded_pictures_are_exact() -> None:
    for case in read_json("processor/cases.json")["cases"]:
        image = Image.open(PARITY / "processor" / case["image"]).convert("RGB")
        recorded = np.asarray(Image.open(PARITY / "processor" / case["hd_image"]))
        assert np.array_equal(hd_crops(image, case["num_crops"]), cut_crops(recorded)), case["name"]


@pytest.mark.parametrize(("width", "height", "num_crops"), SHAPES)
def test_a_fast_resize_stays_within_its_documented_deviation(
    width: int, height: int, num_crops: int
) -> None:
    image = noise(width, height)
    exact = hd_crops(image, num_crops).astype(np.int16)
    steps = np.abs(hd_crops(image, num_crops, "fast") - exact)
    assert steps.max() <= MAX_FAST_STEPS
    assert steps.mean() < 0.3  # noise is the worst case; of a photo it is a tenth


def test_a_fast_resize_is_not_exact() -> None:
    image = noise(640, 480)
    assert not np.array_equal(hd_crops(image, 4, "fast"), hd_crops(image, 4))


@pytest.mark.parametrize("transform", [hd_image, hd_crops])
def test_an_image_that_is_not_rgb_is_refused(
    transform: Callable[[Image.Image, int], object],
) -> None:
    with pytest.raises(ValueError, match="expected an RGB image, got mode L"):
        transform(Image.new("L", (10, 10)), 1)
