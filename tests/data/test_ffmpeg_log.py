import sys
from pathlib import Path

import cv2
import pytest
from phi3v_data.ffmpeg_log import Watch, find_watch
from phi3v_data.video import read_frames

from tests.data.clips import write_clip


@pytest.fixture
def watch() -> Watch:
    watch = find_watch(Path(cv2.__file__))
    if watch is None:
        assert sys.platform != "linux", "the Linux wheels of OpenCV have FFmpeg beside them"
        pytest.skip("this OpenCV has no FFmpeg library beside it")
    return watch


def test_damage_inside_a_picture_is_heard_and_a_whole_clip_is_quiet(
    watch: Watch, tmp_path: Path
) -> None:
    path = write_clip(tmp_path / "a.avi", 30)
    before = watch.count_complaints()
    read_frames(path, 8)
    assert watch.count_complaints() == before
    content = bytearray(path.read_bytes())
    start = content.index(b"\0\0\1\xb6")
    content[start + 60 : start + 120] = b"\xaa" * 60
    path.write_bytes(content)
    read_frames(path, 8)
    assert watch.count_complaints() > before


def test_an_opencv_without_its_own_ffmpeg_is_not_watched(tmp_path: Path) -> None:
    (tmp_path / "opencv_python.libs").mkdir()
    (tmp_path / "opencv_python.libs" / "libavutil-0.so.60").write_bytes(b"not loaded")
    assert find_watch(tmp_path / "cv2" / "__init__.py") is None
