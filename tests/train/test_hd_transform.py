import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from phi3v_train.hd_transform import CROP, cut_crops, hd_image, hd_layout, num_image_tokens
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


def test_crops_are_the_tiles_of_the_canvas_row_by_row() -> None:
    canvas = np.random.default_rng(0).integers(0, 256, (672, 1008, 3), dtype=np.uint8)
    crops = cut_crops(canvas)
    assert crops.shape == (6, 3, CROP, CROP)
    assert np.array_equal(crops[4], canvas[336:, 336:672].transpose(2, 0, 1))


def test_the_padding_is_white_and_the_picture_lies_in_the_middle() -> None:
    canvas = hd_image(Image.new("RGB", (640, 480)), 4)
    assert (canvas[:84] == 255).all()
    assert (canvas[84:588] == 0).all()
    assert (canvas[588:] == 255).all()


def test_an_image_that_is_not_rgb_is_refused() -> None:
    with pytest.raises(ValueError, match="expected an RGB image, got mode L"):
        hd_image(Image.new("L", (10, 10)), 1)
