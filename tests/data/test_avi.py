import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from phi3v_data.avi import Movie, read_movie

from tests.data.clips import decode_all, truncate, write_clip

CLIPS = Path(__file__).resolve().parents[3] / "shared" / "testdata" / "ucf101" / "UCF-101"

PICTURE = b"\0\0\1\xb6"


def understand(path: Path) -> Movie:
    movie = read_movie(path)
    assert movie is not None
    return movie


def decode(content: bytes) -> list[np.ndarray]:
    stream = io.BytesIO(content)
    capture = cv2.VideoCapture()
    assert capture.open(stream, cv2.CAP_FFMPEG, [])  # pyright: ignore[reportCallIssue, reportArgumentType]
    frames: list[np.ndarray] = []
    while True:
        done, frame = capture.read()
        if not done:
            capture.release()
            return frames
        frames.append(frame)


def assert_cuts_are_exact(path: Path, movie: Movie) -> None:
    every = decode_all(path)
    assert movie.num_frames == len(every)
    random = np.random.default_rng(0)
    for count in (1, 2, 3, 8, 8, 8, 20):
        frames = sorted(random.choice(len(every), min(count, len(every)), replace=False).tolist())
        cut = movie.cut(frames)
        assert set(frames) <= set(cut.indices)
        for picture, index in zip(decode(cut.content), cut.indices, strict=True):
            np.testing.assert_array_equal(picture, every[index])


def header_of(content: bytes | bytearray, picture: int) -> int:
    """Where a picture's header starts, past its start code."""
    position = -1
    for _ in range(picture + 1):
        position = content.index(PICTURE, position + 1)
    return position + 4


@pytest.mark.parametrize("fourcc", ["XVID", "DIVX", "FMP4", "MP4V"])
def test_a_cut_decodes_to_the_frames_of_the_whole(tmp_path: Path, fourcc: str) -> None:
    path = write_clip(tmp_path / "a.avi", 40, fourcc=fourcc)
    assert_cuts_are_exact(path, understand(path))


def test_a_cut_holds_the_groups_of_its_frames_and_the_first_packet(tmp_path: Path) -> None:
    movie = understand(write_clip(tmp_path / "a.avi", 40))
    assert movie.cut([14, 25]).indices == (0, 12, 13, 14, 24, 25)
    assert movie.cut([0]).indices == (0,)
    assert movie.cut(range(40)).indices == tuple(range(40))
    assert len(movie.cut([24]).content) < len(movie.cut(range(40)).content) / 5


@pytest.mark.parametrize(
    ("name", "fourcc"), [("a.avi", "MJPG"), ("a.avi", "MP42"), ("a.mp4", "mp4v")]
)
def test_other_codecs_and_containers_are_not_understood(
    tmp_path: Path, name: str, fourcc: str
) -> None:
    assert read_movie(write_clip(tmp_path / name, fourcc=fourcc)) is None


@pytest.mark.parametrize("content", [b"", b"RIFF", b"RIFF\xff\xff\0\0AVI ", b"no video at all"])
def test_what_is_no_avi_is_not_understood(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.avi").write_bytes(content)
    assert read_movie(tmp_path / "a.avi") is None


def test_a_file_cut_off_anywhere_is_not_understood(tmp_path: Path) -> None:
    whole = write_clip(tmp_path / "a.avi", 20).read_bytes()
    end = whole.rindex(b"idx1")
    for fraction in np.linspace(0, 0.999 * end / len(whole), 50):
        (tmp_path / "b.avi").write_bytes(whole)
        assert read_movie(truncate(tmp_path / "b.avi", fraction)) is None


def test_a_header_that_claims_another_count_is_not_believed(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.avi", 20)
    content = bytearray(path.read_bytes())
    content[content.index(b"strh") + 40] += 1
    path.write_bytes(content)
    assert read_movie(path) is None


def test_damage_to_any_bit_that_starts_a_picture_is_noticed_or_harmless(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.avi", 20)
    whole = path.read_bytes()
    num_noticed = 0
    for picture in (0, 1, 12):
        start = header_of(whole, picture)
        for bit in range(-32, 8):  # the start code, kind, seconds and their mark
            content = bytearray(whole)
            content[start + bit // 8] ^= 0x80 >> bit % 8
            path.write_bytes(content)
            movie = read_movie(path)
            num_noticed += movie is None
            if movie is not None:
                assert movie.num_frames == len(decode_all(path))
    assert num_noticed > 75


def test_an_empty_picture_is_not_understood(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.avi", 20)
    content = bytearray(path.read_bytes())
    start = header_of(content, 5)
    # P, no second, mark, 5 bits of time (25 ticks a second), mark, coded.
    assert content[start + 1] & 0xC0 == 0xC0
    content[start + 1] &= 0xBF
    path.write_bytes(content)
    assert len(decode_all(path)) < 20
    assert read_movie(path) is None


def test_settings_that_change_on_the_way_are_not_understood(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.avi", 20)
    content = bytearray(path.read_bytes())
    encoder = content.rindex(b"Lavc")  # before the second key frame
    content[encoder + 4] ^= 1
    path.write_bytes(content)
    assert read_movie(path) is None


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.avi", 20)
    with open(path, "ab") as file:
        file.truncate(1 << 40)  # sparse
    assert read_movie(path) is None


@pytest.mark.skipif(not CLIPS.is_dir(), reason="the real clips are not beside this checkout")
@pytest.mark.parametrize(
    ("name", "num_frames", "num_kept"),
    [
        ("ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi", 164, 61),  # packed, B pictures
        ("BabyCrawling/video3.avi", 185, 80),
        ("Archery/video1.avi", 131, 115),  # one key frame, no B pictures
        ("Basketball/v_Basketball_g01_c01.avi", 141, 60),  # a key frame every 12
        ("Biking/v_Biking_g05_c02.avi", 201, 60),
        ("SoccerJuggling/v_SoccerJuggling_g23_c01.avi", 240, 60),
    ],
)
def test_real_clips_are_cut_exactly_and_to_less(name: str, num_frames: int, num_kept: int) -> None:
    movie = understand(CLIPS / name)
    assert movie.num_frames == num_frames
    assert_cuts_are_exact(CLIPS / name, movie)
    assert len(movie.cut([k * num_frames // 8 for k in range(8)]).indices) <= num_kept
