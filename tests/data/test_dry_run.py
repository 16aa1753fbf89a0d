from collections.abc import Iterator
from pathlib import Path

import pytest
from phi3v_data.conversion.dry_run import PreviewImage, dry_run
from phi3v_data.converters import Item, Rejected, write_image
from phi3v_data.converters.ucf101 import Ucf101
from phi3v_data.schema import Sample, Turn

from tests.data.clips import write_tree


class Numbers:
    """Files of lines; `x` is rejected, everything else a sample."""

    name = "numbers"

    def __init__(self) -> None:
        self.converted: list[str] = []

    def discover(self, source: Path) -> Iterator[Item]:
        for index, path in enumerate(sorted(source.glob("*.txt"))):
            yield Item(index, path.name, str(path), split=path.stem.partition("-")[0])

    def convert(self, item: Item, out_dir: Path) -> Iterator[Sample | Rejected]:
        self.converted.append(item.key)
        for line in Path(item.path).read_text().split():
            if line == "x":
                yield Rejected("unwanted", item.key)
            else:
                image = write_image(out_dir, f"{line}.jpg", b"none")
                turn = Turn(images=(image,), user="?", assistant=line)
                yield Sample(id=line, source="numbers", conversations=(turn,))


def write_numbers(folder: Path, **texts: str) -> Path:
    folder.mkdir()
    for name, text in texts.items():
        (folder / f"{name.replace('_', '-')}.txt").write_text(text)
    return folder


def test_the_first_samples_are_shown_and_nothing_is_written(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "src")
    before = sorted(tmp_path.rglob("*"))
    preview = dry_run(Ucf101(num_frames=2), root)
    assert sorted(tmp_path.rglob("*")) == before
    assert preview.num_items == {"train": 4, "val": 4, "test": 4}
    assert preview.num_files == 12
    assert preview.num_bytes == sum(path.stat().st_size for path in root.rglob("*.avi"))
    assert preview.num_tried == len(preview.samples) == 3
    first = preview.samples[0]
    assert first.split == "train"
    assert [image.name for image in first.images] == list(first.sample.images)
    assert {image.size_wh for image in first.images} == {(64, 48)}


def test_no_more_is_converted_than_needed(tmp_path: Path) -> None:
    source = write_numbers(tmp_path / "src", train_a="1 x 2", train_b="3 4 x", train_c="5")
    converter = Numbers()
    preview = dry_run(converter, source, num_samples=3)
    assert [found.sample.id for found in preview.samples] == ["1", "2", "3"]
    assert [(item, r.reason) for item, r in preview.rejections] == [("train-a.txt", "unwanted")]
    assert converter.converted == ["train-a.txt", "train-b.txt"]
    assert preview.samples[0].images == (PreviewImage("1.jpg", None, 4),)


def test_a_split_can_be_looked_at_alone(tmp_path: Path) -> None:
    source = write_numbers(tmp_path / "src", train_a="1", val_a="2")
    preview = dry_run(Numbers(), source, splits=["val"])
    assert preview.num_items == {"val": 1}
    assert [found.sample.id for found in preview.samples] == ["2"]


def test_a_missing_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="source not found"):
        dry_run(Numbers(), tmp_path / "nowhere")
