from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phi3v_data import open_shards, write_samples, write_shards
from phi3v_train.hd_transform import hd_layout
from phi3v_train.image_lengths import crop_grids, image_lengths

from tests.train.builders import make_sample, make_shards, write_picture

sides = st.one_of(st.integers(1, 60), st.integers(1, 5000), st.integers(1, 2**31))


def grid_of(width: int, height: int, num_crops: int) -> tuple[int, int]:
    try:
        return hd_layout(width, height, num_crops).grid
    except ValueError:
        return 0, 0


@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=40), st.integers(1, 40))
@settings(max_examples=300, deadline=None)
def test_grids_are_those_of_one_image_at_a_time(
    sizes: list[tuple[int, int]], num_crops: int
) -> None:
    found = crop_grids(np.array(sizes), num_crops)
    assert found.tolist() == [list(grid_of(*size, num_crops)) for size in sizes]


@pytest.mark.parametrize("num_crops", [1, 4, 16])
def test_grids_of_all_small_sizes_are_those_of_one_image_at_a_time(num_crops: int) -> None:
    sizes = [(width, height) for width in range(1, 90) for height in range(1, 90)]
    found = crop_grids(np.array(sizes), num_crops)
    assert found.tolist() == [list(grid_of(*size, num_crops)) for size in sizes]


def test_counts_are_summed_over_the_images_of_each_sample(toy_shards: Path) -> None:
    reader = open_shards(toy_shards)
    counts = image_lengths(reader, 4)
    assert counts.num_images.tolist() == [0, 1, 2] * 4
    for number in range(len(reader)):
        layouts = [hd_layout(*size, 4) for size in reader.image_sizes_wh(number)]
        assert counts.num_tokens[number] == sum(layout.num_tokens for layout in layouts)
        crops = sum(layout.grid[0] * layout.grid[1] + 1 for layout in layouts)
        assert counts.num_crops[number] == crops


def test_an_image_without_a_layout_is_named_with_its_sample(tmp_path: Path) -> None:
    samples = [make_sample(f"s{n}", ([f"{n}-a.png", f"{n}-b.png"], "?", "!")) for n in range(3)]
    shards = make_shards(tmp_path, samples)
    write_picture(tmp_path / "images" / "thin.png", (700, 1))
    (tmp_path / "more").mkdir()
    thin = make_sample("thin", (["1-a.png", "thin.png"], "?", "!"))
    write_samples(tmp_path / "thin.jsonl", [*samples, thin])
    write_shards([tmp_path / "thin.jsonl"], tmp_path / "thin", num_workers=1)
    assert image_lengths(open_shards(shards), 1).num_images.tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match=r"sample 'thin', image 'thin\.png': .*too long and thin"):
        image_lengths(open_shards(tmp_path / "thin"), 1)
