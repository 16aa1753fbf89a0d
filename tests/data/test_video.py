import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
from phi3v_data import video
from phi3v_data.video import (
    Sampling,
    Short,
    VideoError,
    encode_jpeg,
    frame_indices,
    missing_bytes,
    read_frames,
    read_jpegs,
    shrink,
)
from PIL import Image

from tests.data.clips import decode_all, truncate, write_clip

TESTDATA = Path(__file__).resolve().parents[3] / "shared" / "testdata"


def set_header_frames(path: Path, count: int) -> None:
    """Overwrite both frame counts of an AVI header."""
    content = bytearray(path.read_bytes())
    main, stream = content.index(b"avih"), content.index(b"strh")
    content[main + 24 : main + 28] = count.to_bytes(4, "little")
    content[stream + 40 : stream + 44] = count.to_bytes(4, "little")
    path.write_bytes(content)


def assert_same(frames: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(frames) == len(expected)
    for frame, other in zip(frames, expected, strict=True):
        np.testing.assert_array_equal(frame, other)


def test_frame_indices_are_the_floor_of_i_times_n_over_count() -> None:
    assert frame_indices(164, 8) == (0, 20, 41, 61, 82, 102, 123, 143)
    assert frame_indices(8, 8) == tuple(range(8))


def test_frame_indices_always_are_as_many_as_asked_for_and_in_range() -> None:
    for count in range(1, 400):
        for wanted in (1, 3, 7, 8, 16):
            indices = frame_indices(count, wanted)
            assert len(indices) == wanted
            assert list(indices) == sorted(indices)
            assert indices[0] == 0
            assert indices[-1] < count


def test_frame_indices_repeat_where_the_clip_is_short() -> None:
    assert frame_indices(3, 8) == (0, 0, 0, 1, 1, 1, 2, 2)


def test_center_takes_the_middle_of_every_stretch() -> None:
    assert frame_indices(164, 8, "center") == (10, 30, 51, 71, 92, 112, 133, 153)
    assert frame_indices(8, 8, "center") == tuple(range(8))
    assert frame_indices(9, 3, "center") == (1, 4, 7)
    assert frame_indices(3, 6, "center") == (0, 0, 1, 1, 2, 2)


def test_random_draws_one_frame_of_every_stretch() -> None:
    drawn: list[set[int]] = [set(), set(), set(), set()]
    for seed in range(200):
        for i, index in enumerate(frame_indices(22, 4, "random", str(seed))):
            drawn[i].add(index)
    starts = (0, 5, 11, 16, 22)
    assert drawn == [set(range(starts[i], starts[i + 1])) for i in range(4)]
    assert frame_indices(3, 8, "random", "any") == frame_indices(3, 8)


def test_random_is_the_same_wherever_and_whenever_it_is_drawn() -> None:
    assert frame_indices(164, 8, "random", "0 train/A/1.avi") == (5, 37, 48, 65, 95, 104, 126, 157)
    assert frame_indices(164, 8, "random", "1 train/A/1.avi") != (5, 37, 48, 65, 95, 104, 126, 157)


@pytest.mark.parametrize("sampling", ["uniform", "center", "random"])
def test_whatever_the_sampling_frames_are_those_of_a_full_decode(
    tmp_path: Path, sampling: Sampling
) -> None:
    path = write_clip(tmp_path / "a.avi", 30)
    every = decode_all(path)
    indices = frame_indices(30, 8, sampling, "seed")
    frames = read_frames(path, 8, sampling=sampling, seed="seed")
    assert_same(frames, [every[i] for i in indices])
    set_header_frames(path, 47)
    assert_same(read_frames(path, 8, sampling=sampling, seed="seed"), frames)


def test_frame_indices_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="got 0 and 8"):
        frame_indices(0, 8)


@pytest.mark.parametrize(
    ("name", "fourcc"), [("a.avi", "XVID"), ("a.avi", "MJPG"), ("a.mp4", "mp4v")]
)
def test_frames_equal_those_of_a_full_decode(tmp_path: Path, name: str, fourcc: str) -> None:
    path = write_clip(tmp_path / name, 30, fourcc=fourcc)
    every = decode_all(path)
    assert len(every) == 30
    assert_same(read_frames(path, 8), [every[i] for i in frame_indices(30, 8)])


@pytest.mark.parametrize("claimed", [0, 1, 5, 29, 31, 300])
def test_a_header_with_a_wrong_frame_count_changes_nothing(tmp_path: Path, claimed: int) -> None:
    path = write_clip(tmp_path / "a.avi", 30)
    every = decode_all(path)
    set_header_frames(path, claimed)
    assert_same(read_frames(path, 8), [every[i] for i in frame_indices(30, 8)])


def test_short_clips_repeat_give_fewer_or_are_refused(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.avi", 3)
    every = decode_all(path)
    assert_same(read_frames(path, 8), [every[i] for i in (0, 0, 0, 1, 1, 1, 2, 2)])
    assert_same(read_frames(path, 8, short="fewer"), every)
    with pytest.raises(VideoError, match="too_short: 3 frames, 8 wanted"):
        read_frames(path, 8, short="reject")


@pytest.mark.parametrize("fraction", [0.95, 0.5, 0.2])
@pytest.mark.parametrize("name", ["a.avi", "a.mp4"])
def test_a_cut_off_file_is_truncated_or_unreadable(
    tmp_path: Path, name: str, fraction: float
) -> None:
    path = write_clip(tmp_path / name, 60, fourcc="XVID" if name == "a.avi" else "mp4v")
    with pytest.raises(VideoError) as caught:
        read_frames(truncate(path, fraction), 8)
    assert caught.value.reason in ("truncated", "unreadable")


def test_an_avi_that_lost_only_its_index_is_whole(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.avi", 30)
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"idx1")])
    assert missing_bytes(path) == 0
    assert len(read_frames(path, 8)) == 8


def test_an_avi_that_was_never_finished_gives_what_decodes(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.avi", 30)
    content = bytearray(path.read_bytes())
    content[4:8] = bytes(4)
    path.write_bytes(content)
    assert missing_bytes(path) == 0


def test_a_matroska_segment_says_how_long_it_is(tmp_path: Path) -> None:
    header = b"\x1a\x45\xdf\xa3\x84head" + b"\x18\x53\x80\x67"
    cases = {b"\x8a" + b"0123456789": 0, b"\x8a" + b"0123": 6, b"\xff" + b"0123": 0}
    for body, missing in cases.items():
        path = tmp_path / "a.webm"
        path.write_bytes(header + body)
        assert missing_bytes(path) == missing


@pytest.mark.parametrize(
    "content",
    [b"", b"no video", b"RIFF", b"RIFF\0\0\0\0AVI ", b"\x1a\x45\xdf\xa3", b"\0\0\0\x08ftyp"],
)
def test_a_file_that_is_no_video_is_unreadable(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.avi").write_bytes(content)
    with pytest.raises(VideoError, match="unreadable"):
        read_frames(tmp_path / "a.avi", 8)


def test_a_script_that_names_other_files_is_not_a_video(tmp_path: Path) -> None:
    write_clip(tmp_path / "real.avi")
    (tmp_path / "a.avi").write_text("ffconcat version 1.0\nfile 'real.avi'\n")
    with pytest.raises(VideoError, match="unreadable"):
        read_frames(tmp_path / "a.avi", 8)


def test_a_colon_in_a_relative_name_is_no_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clip(tmp_path / "a.avi").rename(tmp_path / "take:2.avi")
    monkeypatch.chdir(tmp_path)
    assert len(read_frames("take:2.avi", 4)) == 4


def test_jpegs_are_the_bytes_pil_writes(tmp_path: Path) -> None:
    frame = read_frames(write_clip(tmp_path / "a.avi"), 1)[0]
    for quality in (50, 75, 95):
        stream = io.BytesIO()
        Image.fromarray(frame[:, :, ::-1]).save(stream, "JPEG", quality=quality)
        assert encode_jpeg(frame, quality) == stream.getvalue()


def test_a_frame_too_large_for_jpeg_is_named() -> None:
    with pytest.raises(VideoError, match="70000x1 pixels"):
        encode_jpeg(np.zeros((1, 70_000, 3), np.uint8))


def test_jpegs_of_a_clip_are_its_frames_encoded(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.avi", 3)
    policies: tuple[Short, ...] = ("repeat", "fewer")
    for short in policies:
        expected = [encode_jpeg(frame, 60) for frame in read_frames(path, 8, short=short)]
        assert read_jpegs(path, 8, short=short, quality=60) == expected
    with pytest.raises(VideoError, match="too_short"):
        read_jpegs(path, 8, short="reject")


@pytest.mark.parametrize(
    ("size_hw", "max_side", "expected_hw"),
    [
        ((240, 320), 160, (120, 160)),
        ((320, 240), 160, (160, 120)),
        ((1080, 1920), 336, (189, 336)),
        ((2, 1000), 100, (1, 100)),
        ((3, 1000), 500, (2, 500)),
    ],
)
def test_the_longer_side_becomes_max_side_and_the_shape_stays(
    size_hw: tuple[int, int], max_side: int, expected_hw: tuple[int, int]
) -> None:
    assert shrink(np.zeros((*size_hw, 3), np.uint8), max_side).shape == (*expected_hw, 3)


def test_shrinking_averages_and_never_enlarges() -> None:
    checks = np.indices((40, 40)).sum(axis=0) % 2 * np.uint8(200)
    frame = np.repeat(checks[:, :, None], 3, axis=2).astype(np.uint8)
    assert np.unique(shrink(frame, 20)).tolist() == [100]
    for max_side in (40, 41, 4000):
        assert shrink(frame, max_side) is frame


def test_max_side_bounds_the_jpegs(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.avi")
    small = read_jpegs(path, 4, max_side=32)
    assert {Image.open(io.BytesIO(jpeg)).size for jpeg in small} == {(32, 24)}
    assert read_jpegs(path, 4, max_side=64) == read_jpegs(path, 4)


def test_a_pipe_or_a_missing_file_is_unreadable_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.avi")
    (tmp_path / "dangling.avi").symlink_to("nowhere")
    for name in ("pipe.avi", "dangling.avi", "missing.avi", "."):
        with pytest.raises(VideoError, match="unreadable: it does not exist or is no regular"):
            read_frames(tmp_path / name, 8)


def test_decoding_keeps_one_thread_whatever_the_clip(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.avi", 30)
    before = len(os.listdir("/proc/self/task"))
    video.read_frames(path, 8)
    assert len(os.listdir("/proc/self/task")) <= before + 1


def damage(path: Path, random: np.random.Generator) -> None:
    """Flip a bit inside a picture, well behind its header."""
    content = bytearray(path.read_bytes())
    starts = [match.end() for match in re.finditer(b"\0\0\1\xb6", content)]
    start = int(random.choice(starts)) + 40
    content[start + int(random.integers(200))] ^= 1 << int(random.integers(8))
    path.write_bytes(content)


def test_a_damaged_clip_gives_the_frames_of_a_full_decode_too(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.avi", 40)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    num_compared = num_concealed = 0
    clean = decode_all(path)
    for _ in range(40):
        path.write_bytes(whole)
        damage(path, random)
        # What FFmpeg puts in the place of what is lost may be left from other work, in any of
        # the three: a real difference is there each time.
        for attempt in range(4):
            before, frames, after = decode_all(path), read_frames(path, 8), decode_all(path)
            if len(before) != len(after) or not all(map(np.array_equal, before, after)):
                continue
            expected = [before[i] for i in frame_indices(len(before), 8)]
            if attempt < 3 and not all(map(np.array_equal, frames, expected)):
                continue
            num_compared += 1
            num_concealed += not all(map(np.array_equal, before, clean))
            assert_same(frames, expected)
            break
    assert num_compared > 10
    assert num_concealed > 5


CLIPS = sorted(
    path.relative_to(TESTDATA).as_posix()
    for folder in ("ucf101/UCF-101", "video_other")
    for path in (TESTDATA / folder).rglob("*.*")
    if path.suffix in (".avi", ".mp4", ".webm")
)


@pytest.mark.skipif(not CLIPS, reason="the real clips are not beside this checkout")
@pytest.mark.parametrize("name", CLIPS)
def test_frames_of_real_clips_equal_those_of_a_full_decode(name: str) -> None:
    every = decode_all(TESTDATA / name)
    cases: list[tuple[int, Sampling]] = [
        (4, "uniform"),
        (7, "center"),
        (8, "uniform"),
        (8, "random"),
    ]
    for wanted, sampling in cases:
        indices = frame_indices(len(every), wanted, sampling, name)
        frames = read_frames(TESTDATA / name, wanted, sampling=sampling, seed=name)
        assert_same(frames, [every[i] for i in indices])


@pytest.mark.skipif(not CLIPS, reason="the real clips are not beside this checkout")
@pytest.mark.parametrize("name", CLIPS)
def test_real_clips_are_whole_and_their_halves_are_not(name: str, tmp_path: Path) -> None:
    assert missing_bytes(TESTDATA / name) == 0
    half = tmp_path / Path(name).name
    half.write_bytes((TESTDATA / name).read_bytes())
    with pytest.raises(VideoError):
        read_frames(truncate(half, 0.5), 8)
