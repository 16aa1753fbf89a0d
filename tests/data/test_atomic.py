import os
import subprocess
import sys
from pathlib import Path

import pytest
from phi3v_data.atomic import TEMPORARY_MARK, open_atomic, write_atomic


def test_a_file_appears_only_when_its_block_ends(tmp_path: Path):
    path = tmp_path / "sub" / "x"
    with open_atomic(path) as file:
        file.write(b"half")
        assert not path.exists()

    assert path.read_bytes() == b"half"
    assert os.listdir(tmp_path / "sub") == ["x"]


def test_an_exception_leaves_the_old_content_and_nothing_else(tmp_path: Path):
    write_atomic(tmp_path / "x", "old")

    def write_and_stop() -> None:
        with open_atomic(tmp_path / "x") as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_stop()
    assert (tmp_path / "x").read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_kill_leaves_the_old_content_and_a_marked_temporary_file(tmp_path: Path):
    write_atomic(tmp_path / "x", "old")
    script = (
        "import os\n"
        "from phi3v_data.atomic import open_atomic\n"
        f"with open_atomic({str(tmp_path / 'x')!r}) as file:\n"
        "    file.write(b'new')\n"
        "    file.flush()\n"
        "    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 9

    assert (tmp_path / "x").read_text() == "old"
    (left,) = [name for name in os.listdir(tmp_path) if name != "x"]
    assert TEMPORARY_MARK in left


def test_a_new_file_has_the_usual_permissions(tmp_path: Path):
    write_atomic(tmp_path / "x", b"x")
    (tmp_path / "y").write_bytes(b"x")

    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_text_is_written_as_utf8_and_long_names_are_fine(tmp_path: Path):
    name = "x" * 250
    write_atomic(tmp_path / name, "é")

    assert (tmp_path / name).read_bytes() == b"\xc3\xa9"
