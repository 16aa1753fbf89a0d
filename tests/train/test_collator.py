import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from beartype import beartype
from jaxtyping import Int32, Int64, UInt8, jaxtyped
from phi3v_data import ShardReader
from phi3v_data.images import decode_image
from phi3v_train.chat import IGNORE_INDEX
from phi3v_train.collator import Batch, SampleEncoder, collate, dummy_row
from phi3v_train.hd_transform import CROP, Resize, hd_crops
from PIL import Image
from torch import Tensor

from tests.train.builders import make_sample, open_toy


@pytest.fixture(scope="module")
def toy(tiny: Path, toy_shards: Path) -> tuple[SampleEncoder, ShardReader]:
    return open_toy(tiny, toy_shards, num_crops=4)


def encode_all(encoder: SampleEncoder, reader: ShardReader, numbers: range):
    return [encoder(r.sample, r.images) for r in (reader[number] for number in numbers)]


@jaxtyped(typechecker=beartype)
def check_shapes(
    input_ids: Int64[Tensor, " T"],
    labels: Int64[Tensor, " T"],
    position_ids: Int64[Tensor, " T"],
    cu_seqlens: Int32[Tensor, " bounds"],
    pixel_values: UInt8[Tensor, "C 3 336 336"],
    crop_grid: Int32[Tensor, "I 2"],
) -> None:
    """Fails where two fields disagree about the same letter."""


def check(batch: Batch) -> None:
    check_shapes(
        batch.input_ids,
        batch.labels,
        batch.position_ids,
        batch.cu_seqlens,
        batch.pixel_values,
        batch.crop_grid,
    )
    assert len(batch.cu_seqlens) == len(batch.sample_ids) + 1
    assert len(batch.pixel_values) == int(batch.crop_grid.prod(1).sum())
    assert batch.cu_seqlens[0] == 0
    assert batch.cu_seqlens[-1] == len(batch.input_ids)
    assert batch.max_seqlen == int(batch.cu_seqlens.diff().max())
    assert batch.num_label_tokens == int((batch.labels != IGNORE_INDEX).sum())
    assert (batch.input_ids >= 0).all()


@pytest.mark.parametrize("numbers", [range(1), range(1, 2), range(6)])
def test_a_row_has_the_shapes_of_its_legend(
    toy: tuple[SampleEncoder, ShardReader], numbers: range
) -> None:
    samples = encode_all(*toy, numbers)
    batch = collate(samples)
    check(batch)
    assert batch.sample_ids == tuple(f"s{number}" for number in numbers)


def test_samples_stand_in_a_row_as_they_were_alone(toy: tuple[SampleEncoder, ShardReader]) -> None:
    samples = encode_all(*toy, range(6))
    batch = collate(samples)
    bounds = batch.cu_seqlens.tolist()
    for sample, start, stop in zip(samples, bounds, bounds[1:], strict=False):
        assert batch.input_ids[start:stop].tolist() == sample.input_ids.tolist()
        assert batch.labels[start:stop].tolist() == sample.labels.tolist()
        assert batch.position_ids[start:stop].tolist() == list(range(stop - start))
    assert np.array_equal(batch.pixel_values.numpy(), np.concatenate([s.crops for s in samples]))
    assert batch.crop_grid.tolist() == [pair for s in samples for pair in s.crop_grid.tolist()]


def test_measuring_needs_no_pixel_and_equals_what_is_encoded(
    toy: tuple[SampleEncoder, ShardReader],
) -> None:
    encoder, reader = toy
    for number, encoded in enumerate(encode_all(encoder, reader, range(len(reader)))):
        sizes = reader.image_sizes_wh(number)
        num_tokens, num_crops = encoder.measure(reader.sample(number), sizes)
        assert num_tokens == len(encoded.input_ids)
        assert num_crops == len(encoded.crops) + len(encoded.crop_grid)


def test_a_dummy_row_has_shapes_but_neither_loss_nor_image() -> None:
    batch = dummy_row(7)
    check(batch)
    assert batch.input_ids.tolist() == [7]
    assert batch.num_label_tokens == 0
    assert len(batch.pixel_values) == len(batch.crop_grid) == 0


def test_a_row_needs_a_sample() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        collate([])


def test_moving_a_batch_leaves_the_crop_grid_on_the_host(
    toy: tuple[SampleEncoder, ShardReader],
) -> None:
    moved = collate(encode_all(*toy, range(2))).to("meta")
    assert moved.crop_grid.device == torch.device("cpu")
    assert moved.pixel_values.device == moved.labels.device == torch.device("meta")


def test_a_batch_travels_between_processes(toy: tuple[SampleEncoder, ShardReader]) -> None:
    batch = collate(encode_all(*toy, range(3)))
    again = pickle.loads(pickle.dumps(batch))
    check(again)
    assert torch.equal(again.input_ids, batch.input_ids)


def test_a_broken_image_is_named_with_its_sample(toy: tuple[SampleEncoder, ShardReader]) -> None:
    sample = make_sample("broken-one", (["ok.png", "bad.png"], "Q", "A"))
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    with pytest.raises(ValueError, match=r"^sample 'broken-one', image 'bad\.png': ") as caught:
        toy[0](sample, [file.getvalue(), b"not a picture"])
    assert "\n" not in str(caught.value)


def test_an_image_too_thin_for_any_layout_is_named(toy: tuple[SampleEncoder, ShardReader]) -> None:
    sample = make_sample("thin", (["thread.png"], "Q", "A"))
    file = io.BytesIO()
    Image.new("RGB", (8000, 1)).save(file, "PNG")
    with pytest.raises(ValueError, match=r"^sample 'thin', image 'thread\.png': .*too long"):
        toy[0](sample, [file.getvalue()])


@pytest.mark.parametrize("resize", ["exact", "fast"])
def test_the_crops_of_a_sample_are_those_of_its_images_in_order(
    toy: tuple[SampleEncoder, ShardReader], resize: Resize
) -> None:
    _, reader = toy
    encoder = SampleEncoder(toy[0].chat, num_crops=4, resize=resize)
    for number in range(3):  # no image, one, two
        record = reader[number]
        encoded = encoder(record.sample, record.images)
        crops = [hd_crops(decode_image(data), 4, resize) for data in record.images]
        assert [len(image) for image in crops] == encoded.crop_grid.prod(1).tolist()
        assert np.array_equal(encoded.crops, np.concatenate([encoded.crops[:0], *crops]))


def test_images_are_resized_exactly_unless_asked_otherwise(
    toy: tuple[SampleEncoder, ShardReader],
) -> None:
    encoder, reader = toy
    record = reader[1]
    exact, fast = (
        SampleEncoder(encoder.chat, 4, resize)(record.sample, record.images).crops
        for resize in ("exact", "fast")
    )
    assert np.array_equal(encoder(record.sample, record.images).crops, exact)
    assert not np.array_equal(fast, exact)


def test_crops_are_of_the_size_the_vision_tower_takes(
    toy: tuple[SampleEncoder, ShardReader],
) -> None:
    (sample,) = encode_all(*toy, range(1, 2))
    assert sample.crops.shape[1:] == (3, CROP, CROP)
    assert sample.crops.dtype == np.uint8
