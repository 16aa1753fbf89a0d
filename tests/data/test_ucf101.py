import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from phi3v_data.convert import convert
from phi3v_data.converters import Item, Rejected
from phi3v_data.converters.ucf101 import Ucf101
from phi3v_data.jsonl import read_samples
from phi3v_data.schema import Sample
from PIL import Image

from tests.data.annotations import touch
from tests.data.clips import decode_all, truncate, write_clip, write_tree

ARCHIVE = Path(__file__).resolve().parents[3] / "shared" / "testdata" / "ucf101"
CLIPS = ARCHIVE / "UCF-101"


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


@pytest.mark.parametrize(
    "options",
    [
        {"fold": 4},
        {"val_fraction": 1.0},
        {"unlisted": "val"},
        {"sampling": "first"},
        {"max_side": 0},
    ],
)
def test_settings_of_the_archive_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
        Ucf101(**options)  # pyright: ignore[reportArgumentType]


# --- the whole archive, split by the official lists ----------------------------------------------


def write_archive(root: Path, train: list[str], test: list[str], *others: str) -> Path:
    """`UCF-101/` with empty files for all names, and the lists of fold 1 as they are published."""
    touch(root / "UCF-101", *train, *test, *others)
    folder = root / "ucfTrainTestlist"
    folder.mkdir()
    lines = [os.fsencode(f"{name} 1\r\n") for name in train]
    (folder / "trainlist01.txt").write_bytes(b"".join(lines))
    (folder / "testlist01.txt").write_bytes("".join(f"{name}\r\n" for name in test).encode())
    return root


def clip(label: str, group: int, number: int = 1) -> str:
    return f"{label}/v_{label}_g{group:02}_c{number:02}.avi"


def test_the_lists_say_the_split_and_the_folder_says_the_class(tmp_path: Path) -> None:
    odd = "HandstandPushups/v_HandStandPushups_g01_c01.avi"
    write_archive(tmp_path, [clip("Archery", 8), odd, "Archery/my clip.avi"], [clip("Archery", 1)])
    items = list(Ucf101().discover(tmp_path))
    assert [(item.index, item.key, item.split, item.payload.label) for item in items] == [
        (0, "train/Archery/my clip.avi", "train", "Archery"),
        (1, f"train/{clip('Archery', 8)}", "train", "Archery"),
        (2, f"train/{odd}", "train", "HandstandPushups"),
        (3, f"test/{clip('Archery', 1)}", "test", "Archery"),
    ]
    assert all(Path(item.path).is_file() for item in items)
    classes = {item.payload.prompt.partition(": ")[2] for item in items}
    assert classes == {"Archery, HandstandPushups."}


def test_the_fold_chooses_the_lists(tmp_path: Path) -> None:
    write_archive(tmp_path, [clip("A", 8)], [clip("A", 1)])
    (tmp_path / "ucfTrainTestlist/trainlist02.txt").write_text(clip("A", 1) + " 1\n")
    (tmp_path / "ucfTrainTestlist/testlist02.txt").write_text(clip("A", 8) + "\n")
    for fold, train in ((None, 8), (1, 8), (2, 1)):
        items = list(Ucf101(fold=fold).discover(tmp_path))
        assert [item.key for item in items if item.split == "train"] == [
            f"train/{clip('A', train)}"
        ]
    with pytest.raises(ValueError, match=r"expected the official list trainlist03\.txt"):
        list(Ucf101(fold=3).discover(tmp_path))


def test_an_archive_is_found_by_either_of_its_folders_or_one_above(tmp_path: Path) -> None:
    root = write_archive(tmp_path / "data", [clip("A", 8)], [clip("A", 1)])
    expected = [f"train/{clip('A', 8)}", f"test/{clip('A', 1)}"]
    assert keys(tmp_path) == keys(root) == keys(root / "UCF-101") == expected
    (root / "ucfTrainTestlist").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"or UCF-101/<Class>.* the official lists in ucfTrain"):
        keys(root)
    (root / "UCF-101").rename(root / "clips")
    converter = Ucf101(lists=str(tmp_path / "elsewhere"))
    assert [item.key for item in converter.discover(root / "clips")] == expected


def test_a_clip_is_matched_by_its_name_whatever_its_ending_but_not_its_case(tmp_path: Path) -> None:
    write_archive(tmp_path, [clip("A", 8), clip("A", 9)], [clip("A", 1)])
    folder = tmp_path / "UCF-101/A"
    (folder / "v_A_g08_c01.avi").rename(folder / "v_A_g08_c01.mp4")
    (folder / "v_A_g09_c01.avi").rename(folder / "v_a_g09_c01.avi")
    assert keys(tmp_path) == [
        "train/A/v_A_g08_c01.mp4",
        "test/A/v_A_g01_c01.avi",
        "unlisted/A/v_a_g09_c01.avi",
        "missing_clip/A/v_A_g09_c01.avi",
    ]


def test_unlisted_clips_are_counted_or_train_unless_their_video_is_tested(tmp_path: Path) -> None:
    extra = [clip("A", 8, 2), clip("A", 1, 2), "B/video1.avi"]
    write_archive(tmp_path, [clip("A", 8)], [clip("A", 1)], *extra)
    assert keys(tmp_path)[2:] == [
        "unlisted/A/v_A_g01_c02.avi",
        "unlisted/A/v_A_g08_c02.avi",
        "unlisted/B/video1.avi",
    ]
    items = list(Ucf101(unlisted="train").discover(tmp_path))
    assert [item.key for item in items] == [
        "train/A/v_A_g08_c01.avi",
        "train/A/v_A_g08_c02.avi",
        "train/B/video1.avi",
        "test/A/v_A_g01_c01.avi",
        "unlisted/A/v_A_g01_c02.avi",
    ]
    assert items[-1].payload.reason == "unlisted"
    assert "others of its video are tested" in items[-1].payload.detail


def test_a_class_of_skipped_clips_only_is_not_in_the_prompt(tmp_path: Path) -> None:
    write_archive(tmp_path, [clip("A", 8)], [clip("A", 1)], "B/video1.avi")
    assert next(Ucf101().discover(tmp_path)).payload.prompt.endswith(": A.")


def test_what_is_listed_but_not_there_is_named(tmp_path: Path) -> None:
    train = [clip("A", 8), clip("A", 9), clip("B", 8), clip("B", 9)]
    write_archive(tmp_path, train, [clip("A", 1), clip("B", 1)])
    for name in ("B/v_B_g08_c01.avi", "B/v_B_g09_c01.avi", "B/v_B_g01_c01.avi", clip("A", 1)):
        (tmp_path / "UCF-101" / name).unlink()
    items = list(Ucf101().discover(tmp_path))
    assert [(item.key, item.payload) for item in items[2:]] == [
        ("missing_class/B", Rejected("missing_class", "3 clips listed, none found")),
        (
            f"missing_clip/{clip('A', 1)}",
            Rejected("missing_clip", "in the list of test, but not found"),
        ),
    ]


def test_validation_takes_whole_groups_of_the_training_clips_in_every_class(tmp_path: Path) -> None:
    train = [clip(a, group, n) for a in "AB" for group in range(8, 18) for n in (1, 2, 3)]
    write_archive(tmp_path, train, [clip("A", 1), clip("B", 1)])

    def groups(split: str, **options: Any) -> set[str]:
        items = Ucf101(**options).discover(tmp_path)
        return {item.key.split("/")[2][:8] for item in items if item.split == split}

    assert groups("val") == set()
    held_out = groups("val", val_fraction=0.3)
    assert sorted(name[:4] for name in held_out) == ["v_A_"] * 3 + ["v_B_"] * 3
    assert not held_out & groups("train", val_fraction=0.3)
    assert len(held_out | groups("train", val_fraction=0.3)) == 20
    assert held_out == groups("val", val_fraction=0.3)
    assert held_out != groups("val", val_fraction=0.3, seed=1)
    assert groups("test", val_fraction=0.3) == {"v_A_g01_", "v_B_g01_"}
    assert len(groups("val", val_fraction=0.01)) == 2
    assert len(groups("train", val_fraction=0.99)) == 2


def test_splits_of_the_archive_come_in_the_order_train_val_test(tmp_path: Path) -> None:
    train = [clip(label, group) for label in "AB" for group in (8, 9)]
    write_archive(tmp_path, train, [clip("A", 1)])
    items = list(Ucf101(val_fraction=0.5).discover(tmp_path))
    assert [item.split for item in items] == ["train", "train", "val", "val", "test"]
    assert [item.index for item in items] == list(range(5))
    for split in ("train", "val"):
        paths = [item.path for item in items if item.split == split]
        assert paths == sorted(paths)


@pytest.mark.parametrize(
    "line", ["no slash", "A/b/c.avi 1", "../A.avi", "A\\v_A_g01_c01.avi", "/etc/passwd"]
)
def test_a_line_that_names_no_clip_is_refused_with_its_place(tmp_path: Path, line: str) -> None:
    write_archive(tmp_path, [clip("A", 8)], [clip("A", 1)])
    with open(tmp_path / "ucfTrainTestlist/testlist01.txt", "a") as file:
        file.write(f"\r\n{line}\r\n")
    with pytest.raises(ValueError, match=r"testlist01\.txt:3: expected <Class>/<file>"):
        keys(tmp_path)


def test_a_byte_order_mark_and_names_that_are_not_utf8_are_taken(tmp_path: Path) -> None:
    write_archive(tmp_path, [os.fsdecode(b"A/caf\xe9.avi")], [clip("A", 1)])
    path = tmp_path / "ucfTrainTestlist/trainlist01.txt"
    path.write_bytes(b"\xef\xbb\xbfA/caf\xe9.avi 1\r\n")
    assert keys(tmp_path) == ["train/A/caf\\udce9.avi", f"test/{clip('A', 1)}"]


def test_a_clip_in_both_lists_is_refused(tmp_path: Path) -> None:
    write_archive(tmp_path, [clip("A", 8)], [clip("A", 8)])
    with pytest.raises(ValueError, match=r"testlist01\.txt:1: .* is in the list of train, too"):
        keys(tmp_path)


@pytest.mark.parametrize("option", [{"fold": 1}, {"val_fraction": 0.1}, {"unlisted": "train"}])
def test_settings_of_the_archive_are_refused_where_folders_say_the_split(
    tmp_path: Path, option: dict[str, Any]
) -> None:
    touch(tmp_path, "train/A/1.avi")
    with pytest.raises(ValueError, match="the folders already say the split"):
        list(Ucf101(**option).discover(tmp_path))


def test_a_file_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "a.avi").touch()
    with pytest.raises(ValueError, match="expected a folder of videos"):
        keys(tmp_path / "a.avi")


def test_random_frames_depend_on_the_seed_and_the_clip(tmp_path: Path) -> None:
    for name in ("1", "2"):
        write_clip(tmp_path / "src/train/A" / f"{name}.avi", 100)
    first, second = Ucf101().discover(tmp_path / "src")

    def pictures(item: Item, seed: int) -> list[bytes]:
        sample = convert_one(item, tmp_path / "out", Ucf101(sampling="random", seed=seed))
        assert isinstance(sample, Sample)
        return [(tmp_path / "out/images" / name).read_bytes() for name in sample.images]

    assert pictures(first, 0) == pictures(first, 0)
    assert pictures(first, 0) != pictures(first, 1)
    assert pictures(first, 0) != pictures(second, 0), "the same clip under two names"


@pytest.mark.skipif(not ARCHIVE.is_dir(), reason="the real clips are not beside this checkout")
def test_the_real_lists_split_the_real_clips(tmp_path: Path) -> None:
    result = convert(Ucf101(fold=1), ARCHIVE, tmp_path / "out", num_workers=2)
    assert result.counts == {"train": 1, "test": 3}
    assert result.rejected["unlisted"] == 2
    assert result.rejected["missing_class"] == 101 - 6
    assert sum(result.rejected.values()) == result.num_items - 4
    (train,) = read_samples(result.files["train"])
    assert train.conversations[0].assistant == "SoccerJuggling"


@pytest.mark.skipif(not ARCHIVE.is_dir(), reason="the real clips are not beside this checkout")
@pytest.mark.parametrize("fold", [1, 2, 3])
def test_every_line_of_the_real_lists_is_found_or_named(fold: int) -> None:
    num_listed = 0
    for item in Ucf101(fold=fold).discover(ARCHIVE):
        if not isinstance(item.payload, Rejected) or item.payload.reason == "missing_clip":
            num_listed += 1
        elif item.payload.reason == "missing_class":
            num_listed += int(item.payload.detail.split()[0])
    assert num_listed == 13_320


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
