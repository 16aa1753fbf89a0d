import json
from pathlib import Path

import numpy as np
import pytest
from phi3v_data.convert import convert
from phi3v_data.converters import get_converter
from phi3v_data.converters.clip_folders import ClipFolders
from phi3v_data.jsonl import read_samples
from PIL import Image

from tests.data.annotations import touch
from tests.data.clips import decode_all, truncate, write_clip

CLIPS = Path(__file__).resolve().parents[3] / "shared" / "testdata" / "video_other"


def keys(root: Path) -> list[str]:
    return [item.key for item in ClipFolders().discover(root)]


def test_splits_and_classes_have_any_names(tmp_path: Path) -> None:
    write_clip(tmp_path / "src/train/wave/a.b.avi", 20)
    write_clip(tmp_path / "src/held-out/run/c.mp4", 20, fourcc="mp4v")
    result = convert(ClipFolders(num_frames=2), tmp_path / "src", tmp_path / "out", num_workers=0)
    assert {split: path.name for split, path in result.files.items()} == {
        "train": "video_train.jsonl",
        "held-out": "video_held-out.jsonl",
    }
    (line,) = result.files["held-out"].read_text().splitlines()
    turn = {
        "images": ["held-out/run/c.0.jpg", "held-out/run/c.1.jpg"],
        "user": "Classify the video into one of the following classes: run, wave.",
        "assistant": "run",
    }
    assert json.loads(line) == {
        "id": "held-out-0000000001",
        "source": "video",
        "conversations": [turn],
    }
    assert (tmp_path / "out/images/train/wave/a.b.1.jpg").is_file()


def test_train_val_test_come_first_then_the_others_bytewise(tmp_path: Path) -> None:
    names = ("dev/A/1.avi", "test/A/1.avi", "train/B/1.avi", "val/A/1.avi", "Extra/A/1.avi")
    assert keys(touch(tmp_path, *names)) == [
        "train/B/1.avi", "val/A/1.avi", "test/A/1.avi", "Extra/A/1.avi", "dev/A/1.avi",
    ]  # fmt: skip


def test_the_tree_may_be_one_folder_further_down(tmp_path: Path) -> None:
    touch(tmp_path, "hmdb/train/wave/1.avi", "hmdb/readme/txt/notes.txt", "lists/a.txt")
    assert keys(tmp_path) == keys(tmp_path / "hmdb") == ["train/wave/1.avi"]
    touch(tmp_path, "other/train/A/1.avi")
    with pytest.raises(ValueError, match=r"holds several data sets \(hmdb, other\); name one"):
        keys(tmp_path)


@pytest.mark.parametrize("name", ["1.avi", "wave/1.avi", "train/wave/notes.txt", "train/.x/1.avi"])
def test_a_folder_without_clips_of_a_class_says_what_was_expected(
    tmp_path: Path, name: str
) -> None:
    touch(tmp_path, name)
    with pytest.raises(ValueError, match=r"no videos found in .*: expected <split>/<Class>/\*.avi"):
        keys(tmp_path)


def test_a_split_that_cannot_name_a_file_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "src/my split/A/1.avi")
    with pytest.raises(ValueError, match="'my split' is no name for a split's file"):
        convert(ClipFolders(), tmp_path / "src", tmp_path / "out", num_workers=0)


def test_the_question_and_the_name_are_options(tmp_path: Path) -> None:
    write_clip(tmp_path / "src/train/wave/a.avi")
    write_clip(tmp_path / "src/train/run/a.avi")
    converter = get_converter(
        "phi3v_data.converters.clip_folders:ClipFolders",
        dataset="hmdb51",
        prompt="Which of {classes}? {one word}",
    )
    result = convert(converter, tmp_path / "src", tmp_path / "out", num_workers=0)
    assert result.files["train"].name == "hmdb51_train.jsonl"
    sample = next(read_samples(result.files["train"]))
    assert sample.source == "hmdb51"
    assert sample.conversations[0].user == "Which of run, wave? {one word}"


@pytest.mark.parametrize(
    "options",
    [
        {"dataset": "../x"},
        {"dataset": ""},
        {"prompt": " "},
        {"num_frames": 0},
        {"max_side": "9"},
        {"seed": 0.5},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
        ClipFolders(**options)  # pyright: ignore[reportArgumentType]


def test_max_side_bounds_the_pictures_and_a_bad_clip_is_counted(tmp_path: Path) -> None:
    write_clip(tmp_path / "src/train/A/a.avi")
    truncate(write_clip(tmp_path / "src/train/A/b.avi"), 0.5)
    result = convert(ClipFolders(max_side=32), tmp_path / "src", tmp_path / "out", num_workers=0)
    assert result.rejected == {"truncated": 1}
    pictures = sorted((tmp_path / "out/images").rglob("*.jpg"))
    assert len(pictures) == 8
    assert {Image.open(picture).size for picture in pictures} == {(32, 24)}


@pytest.mark.skipif(not CLIPS.is_dir(), reason="the real clips are not beside this checkout")
def test_real_clips_of_any_container_give_the_frames_of_a_full_decode(tmp_path: Path) -> None:
    clips = [path for path in sorted(CLIPS.iterdir()) if path.suffix != ".md"]
    folder = tmp_path / "src/train/any"
    folder.mkdir(parents=True)
    for path in clips:
        (folder / path.name).symlink_to(path)
    converter = ClipFolders(num_frames=4, sampling="center")
    result = convert(converter, tmp_path / "src", tmp_path / "out", num_workers=2)
    assert not result.rejected
    samples = list(read_samples(result.files["train"]))
    assert len(samples) == len(clips)
    for path, sample in zip(clips, samples, strict=True):
        every = decode_all(path)
        for k, name in enumerate(sample.images):
            frame = np.ascontiguousarray(every[(2 * k + 1) * len(every) // 8][:, :, ::-1])
            Image.fromarray(frame).save(tmp_path / "x.jpg", "JPEG")
            written = (tmp_path / "out/images" / name).read_bytes()
            assert written == (tmp_path / "x.jpg").read_bytes()
