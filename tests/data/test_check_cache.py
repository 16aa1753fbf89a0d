"""The cache of image checks: what it believes, what it does not, and how it survives damage."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace
from phi3v_data import check_cache
from phi3v_data.check_cache import BATCH, CheckCache, default_path, open_cache
from phi3v_data.image_check import ImageCheck, check_image
from phi3v_data.images import ImageInfo
from PIL import Image

INFO = ImageInfo(4, 3, "RGB", "PNG", 6, 16, True, False)
CHECK = ImageCheck("ok", "", INFO, 100, (1 << 64) - 1)


@pytest.fixture(autouse=True)
def old_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' files are new; see the test of that for the real limit."""
    monkeypatch.setattr(check_cache, "FRESH_NS", -(10**15))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "images.sqlite3"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    root.mkdir()
    Image.new("RGB", (4, 3)).save(root / "a.png")
    Image.effect_noise((40, 30), 50).save(root / "b.jpg")
    (root / "cut.jpg").write_bytes((root / "b.jpg").read_bytes()[:-50])
    return root


def status(path: Path, size: int = 100) -> os.stat_result:
    """Of a file at `path`, made so long."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    return path.lstat()


def run(root: Path, file: Path, *names: str, level: str = "deep") -> tuple[list[ImageCheck], int]:
    """The checks of one run with a cache, and how many of them it knew."""
    with open_cache(level, file) as cache:  # type: ignore[arg-type]
        checks = [check_image(root, name, level, cache) for name in names]  # type: ignore[arg-type]
    assert cache.problem == ""
    return checks, cache.num_hits


def test_a_second_run_knows_what_the_first_found(root: Path, file: Path):
    names = ("a.png", "b.jpg", "cut.jpg")
    first, num_hits = run(root, file, *names)
    assert num_hits == 0
    second, num_hits = run(root, file, *names)

    assert num_hits == 3
    assert second == first == [check_image(root, name) for name in names]
    assert [check.kind for check in second] == ["ok", "ok", "undecodable"]


def test_within_a_run_an_image_is_known_after_its_first_check(root: Path, file: Path):
    assert run(root, file, "a.png", "a.png", "./a.png")[1] == 2


@pytest.mark.parametrize("change", ["size", "content", "date", "mode"])
def test_a_file_that_changed_is_looked_at_again(root: Path, file: Path, change: str):
    run(root, file, "a.png")
    path = root / "a.png"
    before = path.stat()
    if change == "size":
        path.write_bytes(path.read_bytes() + b"more")
    elif change == "content":  # same size, and the old date put back
        path.write_bytes(bytes(before.st_size))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "date":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    else:
        path.chmod(0o600 if before.st_mode & 0o077 else 0o644)
    (check,), num_hits = run(root, file, "a.png")

    assert num_hits == 0
    assert (check.kind == "ok") == (change != "content")
    assert run(root, file, "a.png")[1] == 1


def test_a_level_does_not_answer_for_another(root: Path, file: Path):
    run(root, file, "a.png", level="header")

    assert run(root, file, "a.png", level="deep")[1] == 0
    assert run(root, file, "a.png", level="header")[1] == 1


def test_other_versions_of_the_checks_are_not_believed(
    root: Path, file: Path, monkeypatch: pytest.MonkeyPatch
):
    run(root, file, "a.png")
    monkeypatch.setattr(check_cache, "_versions", lambda: b"other")

    assert run(root, file, "a.png")[1] == 0
    assert run(root, file, "a.png")[1] == 1


def test_only_verdicts_on_content_are_kept(root: Path, file: Path):
    (root / "dir.png").mkdir()
    names = ("no.png", "dir.png", "../a.png")
    run(root, file, *names)
    Image.new("RGB", (4, 3)).save(root / "no.png")
    checks, num_hits = run(root, file, *names)

    assert num_hits == 0
    assert [check.kind for check in checks] == ["ok", "missing", "outside"]


def test_a_file_that_changed_just_now_is_not_kept(
    root: Path, file: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(check_cache, "FRESH_NS", 60 * 10**9)
    run(root, file, "a.png")

    assert run(root, file, "a.png")[1] == 0


def test_every_field_comes_back(file: Path, tmp_path: Path):
    odd = replace(CHECK, kind="undecodable", problem="is émpty", info=None, cause="empty")
    with open_cache("full", file) as cache:
        for name, check in (("a", CHECK), ("b\udcff", odd)):
            cache.put(f"/x/{name}", status(tmp_path / name), check)
    with open_cache("full", file) as cache:
        assert cache.get("/x/a", (tmp_path / "a").lstat()) == CHECK
        assert cache.get("/x/b\udcff", (tmp_path / "b\udcff").lstat()) == odd
        assert cache.get("/x/b", (tmp_path / "a").lstat()) is None


@pytest.mark.parametrize("step", [1, -1, 7])
def test_many_images_are_found_in_whatever_order(file: Path, tmp_path: Path, step: int):
    num = 3 * BATCH + 5  # in batches, the last one at the end
    state = status(tmp_path / "a")
    with open_cache("deep", file) as cache:
        for i in range(num):
            cache.put(f"/x/{i}", state, replace(CHECK, xxh3_64=i))
    with open_cache("deep", file) as cache:
        for i in (step * i % num for i in range(num)):
            found = cache.get(f"/x/{i}", state)
            assert found is not None
            assert found.xxh3_64 == i
            assert cache.get(f"/x/{i}~", state) is None
        assert cache.num_hits == num


def test_what_another_process_wrote_is_seen_and_nothing_of_it_lost(file: Path, tmp_path: Path):
    state = status(tmp_path / "a")
    with open_cache("deep", file) as one, open_cache("deep", file) as other:
        assert one.get("/x/0", state) is None
        for i in range(BATCH + 3):
            one.put(f"/x/{i}", state, CHECK)
            other.put(f"/y/{i}", state, CHECK)
        one.flush()
        other.flush()
        assert other.get("/x/0", state) == one.get("/y/0", state) == CHECK
    with open_cache("deep", file) as cache:
        for i in range(BATCH + 3):
            assert cache.get(f"/x/{i}", state) == cache.get(f"/y/{i}", state) == CHECK


WRITER = """
import sys
from pathlib import Path
from phi3v_data import check_cache
from phi3v_data.image_check import ImageCheck
check_cache.FRESH_NS = -10**15
file, state_of, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
with check_cache.open_cache("deep", file) as cache:
    for i in range(3000):
        cache.put(f"/{name}/{i}", state_of.lstat(), ImageCheck("ok", num_bytes=100))
assert not cache.problem, cache.problem
"""


def test_processes_that_write_at_once_do_not_disturb_each_other(file: Path, tmp_path: Path):
    state = status(tmp_path / "a")
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITER, file, tmp_path / "a", name])
        for name in ("x", "y", "z")
    ]

    assert [process.wait() for process in processes] == [0, 0, 0]
    with open_cache("deep", file) as cache:
        for name in ("x", "y", "z"):
            for i in range(3000):
                assert cache.get(f"/{name}/{i}", state) is not None


@pytest.mark.parametrize("content", [b"not a database" * 100, b"SQLite format 3\0" + bytes(5000)])
def test_a_file_that_is_no_cache_is_replaced(root: Path, file: Path, content: bytes):
    file.parent.mkdir()
    file.write_bytes(content)

    assert run(root, file, "a.png")[1] == 0
    assert run(root, file, "a.png")[1] == 1


def test_another_programs_table_is_replaced(root: Path, file: Path):
    file.parent.mkdir()
    connection = sqlite3.connect(file)
    connection.execute("CREATE TABLE checks (a)")
    connection.close()
    run(root, file, "a.png")

    assert run(root, file, "a.png")[1] == 1


def test_damage_anywhere_in_the_file_never_gives_a_wrong_check(file: Path, tmp_path: Path):
    state = status(tmp_path / "a")
    checks = [replace(CHECK, xxh3_64=i, problem=f"problem {i}") for i in range(200)]
    with open_cache("deep", file) as cache:
        for i, check in enumerate(checks):
            cache.put(f"/x/{i}", state, check)
    whole = file.read_bytes()
    num_found = 0
    for place in range(50, len(whole), len(whole) // 60):
        file.write_bytes(whole[:place] + b"\xa5\x5a\xff\0" + whole[place + 4 :])
        with open_cache("deep", file) as cache:
            for i, check in enumerate(checks):
                found = cache.get(f"/x/{i}", state)
                assert found in (None, check)
                num_found += found is not None
            cache.put("/x/new", state, CHECK)
        with open_cache("deep", file) as cache:
            cache.get("/x/new", state)

    assert num_found > 1000  # most damage hits an entry or two


def test_rows_of_another_kind_are_not_believed(root: Path, file: Path):
    run(root, file, "a.png", "b.jpg")
    connection = sqlite3.connect(file)
    (key,) = connection.execute("SELECT key FROM checks").fetchone()
    for value in (7, "text", "\udcff".encode("utf-8", "surrogatepass").decode("latin-1"), b""):
        connection.execute("UPDATE checks SET value = ?", (value,))
        connection.execute("INSERT OR REPLACE INTO checks VALUES (?, ?)", (value, 7))
    connection.execute("UPDATE checks SET value = CAST(x'ff' AS TEXT) WHERE key = ?", (key,))
    connection.commit()
    connection.close()

    assert run(root, file, "a.png", "b.jpg")[1] == 0
    assert run(root, file, "a.png", "b.jpg")[1] == 2


def test_a_cache_cut_short_is_used_or_replaced(root: Path, file: Path):
    run(root, file, "a.png", "b.jpg")
    whole = file.read_bytes()
    for end in (0, 1, 100, 4096, len(whole) - 1):
        file.write_bytes(whole[:end])
        checks, _ = run(root, file, "a.png")
        assert checks == [check_image(root, "a.png")]
        assert run(root, file, "a.png")[1] == 1


def test_damage_during_a_run_costs_the_cache_and_nothing_else(root: Path, file: Path):
    run(root, file, "a.png", "b.jpg")
    with open_cache("deep", file) as cache:
        with file.open("r+b") as opened:
            opened.write(b"x" * file.stat().st_size)
        checks = [check_image(root, name, "deep", cache) for name in ("a.png", "b.jpg")]

    assert checks == [check_image(root, name) for name in ("a.png", "b.jpg")]
    assert run(root, file, "a.png")[0] == checks[:1]
    assert run(root, file, "a.png")[1] == 1


def test_where_nothing_can_be_stored_checks_go_on_and_the_reason_is_told(
    root: Path, tmp_path: Path
):
    (tmp_path / "file").write_bytes(b"")
    with open_cache("deep", tmp_path / "file" / "images.sqlite3") as cache:
        assert check_image(root, "a.png", "deep", cache).kind == "ok"
        assert check_image(root, "a.png", "deep", cache).kind == "ok"

    assert cache.num_hits == 0
    assert "no cache at" in cache.problem
    assert "images.sqlite3" in cache.problem


def test_a_cache_that_grew_too_large_starts_anew(
    root: Path, file: Path, monkeypatch: pytest.MonkeyPatch
):
    run(root, file, "a.png")
    monkeypatch.setattr(check_cache, "MAX_BYTES", 100)

    assert run(root, file, "a.png")[1] == 0


def test_the_default_place_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "phi3v-data" / "images.sqlite3"

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for base in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", base)
        assert default_path() == tmp_path / "home/.cache/phi3v-data/images.sqlite3"


def test_a_cache_is_closed_once_and_for_all(file: Path, tmp_path: Path):
    cache = CheckCache(file, "deep")
    state = status(tmp_path / "a")
    cache.put("/x/a", state, CHECK)
    cache.close()
    cache.close()

    assert cache.get("/x/a", state) is None
    with open_cache("deep", file) as cache:
        assert cache.get("/x/a", state) == CHECK
