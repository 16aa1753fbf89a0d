import json
import os
from pathlib import Path

import numpy as np
import pytest
from phi3v_data.convert import convert
from phi3v_data.converters import Item, Rejected
from phi3v_data.converters.ucf101 import Ucf101
from phi3v_data.jsonl import read_samples
from phi3v_data.schema import Sample
from PIL import Image

from tests.data.clips import decode_all, truncate, write_clip, write_tree

CLIPS = Path(__file__).resolve().parents[3] / "shared" / "testdata" / "ucf101" / "UCF-101"


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def keys(root: Path) -> list[str]:
    return [item.key for item in Ucf101().discover(root)]


def convert_one(item: Item, out_dir: Path, converter: Ucf101 | None = None) -> Sample | Rejected:
    (result,) = (converter or Ucf101()).convert(item, out_dir)
    return result


def test_a_clip_becomes_the_sample_of_the_cookbook(tmp_path: Path) -> None:
    root = tmp_path / "src"
    write_clip(root / "train/Biking/v_Biking_g01_c01.avi", 20)
    path = write_clip(root / "val/BabyCrawling/v_BabyCrawling_g21_c04.avi", 30)
    item = list(Ucf101().discover(root))[1]
    sample = convert_one(item, tmp_path / "out")
    assert isinstance(sample, Sample)
    names = [f"val/BabyCrawling/v_BabyCrawling_g21_c04.{k}.jpg" for k in range(8)]
    prompt = "Classify the video into one of the following classes: BabyCrawling, Biking."
    turn = {"images": names, "user": prompt, "assistant": "BabyCrawling"}
    expected = {"id": "val-0000000001", "source": "ucf101", "conversations": [turn]}
    assert json.loads(sample.to_json()) == expected

    every = decode_all(path)
    for k, name in enumerate(names):
        Image.fromarray(every[k * 30 // 8][:, :, ::-1]).save(tmp_path / "expected.jpg", "JPEG")
        assert (tmp_path / "out/images" / name).read_bytes() == (
            tmp_path / "expected.jpg"
        ).read_bytes()


def test_one_counter_runs_over_train_val_test_in_bytewise_path_order(tmp_path: Path) -> None:
    touch(
        tmp_path, "test/B/1.avi", "train/B/x.avi", "val/A/z.avi", "train/A/b.avi", "train/A/B.avi",
        "train/A-b/q.avi", "train/A/é.avi",
    )  # fmt: skip
    expected = [
        "train/A-b/q.avi", "train/A/B.avi", "train/A/b.avi", "train/A/é.avi", "train/B/x.avi",
        "val/A/z.avi", "test/B/1.avi",
    ]  # fmt: skip
    assert keys(tmp_path) == expected
    train = [os.fsencode(key) for key in expected[:5]]
    assert train == sorted(train)
    assert [item.index for item in Ucf101().discover(tmp_path)] == list(range(7))


def test_a_rejected_clip_leaves_a_gap_in_the_ids(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "src")
    truncate(root / "train/Archery/v_Archery_g01_c01.avi", 0.5)
    result = convert(Ucf101(), root, tmp_path / "out", num_workers=0)
    assert result.counts == {"train": 3, "val": 4, "test": 4}
    assert result.rejected == {"truncated": 1}
    ids = [sample.id for sample in read_samples(result.files["train"])]
    assert ids == ["train-0000000000", "train-0000000002", "train-0000000003"]
    assert next(read_samples(result.files["val"])).id == "val-0000000004"


def test_the_class_is_the_folder_and_any_file_name_is_taken(tmp_path: Path) -> None:
    touch(
        tmp_path, "train/HandstandPushups/v_HandStandPushups_g01_c01.avi", "train/A/video1.avi",
        "train/A/clip.MP4", "train/A/notes.txt", "train/A/._video1.avi", "train/readme.avi",
    )  # fmt: skip
    items = list(Ucf101().discover(tmp_path))
    assert [(item.key, item.payload.label) for item in items] == [
        ("train/A/clip.MP4", "A"),
        ("train/A/video1.avi", "A"),
        ("train/HandstandPushups/v_HandStandPushups_g01_c01.avi", "HandstandPushups"),
    ]


def test_a_dot_in_the_file_name_stays(tmp_path: Path) -> None:
    write_clip(tmp_path / "src/train/A/clip.v1.2.avi")
    sample = convert_one(next(Ucf101(num_frames=2).discover(tmp_path / "src")), tmp_path / "out")
    assert isinstance(sample, Sample)
    assert sample.images[0] == "train/A/clip.v1.2.0.jpg"
    assert all((tmp_path / "out/images" / name).is_file() for name in sample.images)


def test_files_that_differ_only_in_their_ending_keep_their_images_apart(tmp_path: Path) -> None:
    touch(tmp_path, "train/A/a.avi", "train/A/a.mp4", "train/A/a.mp4.avi", "val/A/a.avi")
    stems = [item.payload.stem for item in Ucf101().discover(tmp_path)]
    assert stems == ["a", "a.mp4", "a.mp4.avi", "a"]


def test_the_prompt_lists_the_sorted_classes_of_all_splits(tmp_path: Path) -> None:
    touch(tmp_path, "train/Zebra/1.avi", "val/Ant/1.avi", "test/Mouse/1.avi")
    (tmp_path / "train/Empty").mkdir()
    prompts = {item.payload.prompt for item in Ucf101().discover(tmp_path)}
    assert prompts == {"Classify the video into one of the following classes: Ant, Mouse, Zebra."}


def test_the_data_set_may_be_one_folder_further_down(tmp_path: Path) -> None:
    touch(tmp_path, "UCF101_subset/train/A/1.avi", "__MACOSX/x")
    assert keys(tmp_path) == ["train/A/1.avi"]
    touch(tmp_path, "other/train/A/1.avi")
    with pytest.raises(ValueError, match=r"holds several data sets \(UCF101_subset, other\)"):
        keys(tmp_path)


@pytest.mark.parametrize("name", ["readme.txt", "train/A/readme.txt", "UCF-101/A/1.avi"])
def test_a_folder_without_videos_says_what_was_expected(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name)
    with pytest.raises(
        ValueError, match=r"no videos found in .*: expected \{train,val,test\}/<Class>"
    ):
        keys(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "unreadable"), (b"not a video" * 50, "unreadable")]
)
def test_a_file_that_is_no_video_is_rejected(tmp_path: Path, content: bytes, reason: str) -> None:
    touch(tmp_path, "train/A/1.avi")
    (tmp_path / "train/A/1.avi").write_bytes(content)
    rejected = convert_one(next(Ucf101().discover(tmp_path)), tmp_path / "out")
    assert isinstance(rejected, Rejected)
    assert rejected.reason == reason
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [b"a\nb.avi", b"a\xffb.avi", b"a\x1bb.avi"])
def test_a_name_no_json_or_terminal_should_hold_is_rejected(tmp_path: Path, name: bytes) -> None:
    folder = tmp_path / "src/train/A"
    write_clip(folder / "1.avi").rename(os.path.join(folder, os.fsdecode(name)))
    result = convert(Ucf101(), tmp_path / "src", tmp_path / "out", num_workers=0)
    assert result.rejected == {"bad_name": 1}


def test_short_clips_follow_the_policy(tmp_path: Path) -> None:
    write_clip(tmp_path / "src/train/A/1.avi", 3)
    item = next(Ucf101().discover(tmp_path / "src"))
    for converter, number in ((Ucf101(short="repeat"), 8), (Ucf101(short="fewer"), 3)):
        sample = convert_one(item, tmp_path / "out", converter)
        assert isinstance(sample, Sample)
        assert len(sample.images) == number
    rejected = convert_one(item, tmp_path / "out", Ucf101(short="reject"))
    assert rejected == Rejected("too_short", "3 frames, 8 wanted")


@pytest.mark.parametrize(
    "options", [{"num_frames": 0}, {"quality": 101}, {"short": "drop"}, {"num_frames": 10**6}]
)
def test_settings_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
        Ucf101(**options)  # pyright: ignore[reportArgumentType]


@pytest.mark.skipif(not CLIPS.is_dir(), reason="the real clips are not beside this checkout")
def test_real_clips_convert_to_the_frames_of_a_full_decode(tmp_path: Path) -> None:
    clips = sorted(CLIPS.glob("*/*.avi"))
    for number, path in enumerate(clips):
        split = ("train", "val", "test")[number % 3]
        target = tmp_path / "src" / split / path.parent.name / path.name
        target.parent.mkdir(parents=True)
        target.symlink_to(path)
    result = convert(Ucf101(), tmp_path / "src", tmp_path / "out", num_workers=2)
    assert sum(result.counts.values()) == len(clips)
    assert not result.rejected
    by_label = {path.parent.name: decode_all(path) for path in clips}
    for file in result.files.values():
        for sample in read_samples(file):
            every = by_label[str(sample.conversations[0].assistant)]
            for k, name in enumerate(sample.images):
                frame = every[k * len(every) // 8]
                Image.fromarray(np.ascontiguousarray(frame[:, :, ::-1])).save(
                    tmp_path / "x.jpg", "JPEG"
                )
                assert (tmp_path / "out/images" / name).read_bytes() == (
                    tmp_path / "x.jpg"
                ).read_bytes()
