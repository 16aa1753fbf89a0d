import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import phi3v_data
import pytest
from phi3v_data.convert import ConversionResult, ConverterError, convert
from phi3v_data.converters import Converter, Item, Rejected, write_image
from phi3v_data.converters.ucf101 import Ucf101
from phi3v_data.jsonl import read_samples
from phi3v_data.schema import Sample, Turn

from tests.data.clips import truncate, write_tree

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "custom_converter.py"


@pytest.fixture(autouse=True)
def tests_are_importable_in_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


@dataclass(frozen=True)
class Words:
    """Text files: the name says what happens, the content is the caption."""

    shout: bool = False
    name = "words"

    def discover(self, source: Path) -> Iterator[Item]:
        for index, path in enumerate(sorted(source.glob("*.txt"))):
            split = "val" if path.name.startswith("val") else "train"
            yield Item(index, key=path.name, path=str(path), split=split)

    def convert(self, item: Item, out_dir: Path) -> Iterator[Sample | Rejected]:
        text = Path(item.path).read_text()
        if text == "die":
            os._exit(9)
        if text == "raise":
            raise KeyError("no such label")
        if text == "full":
            raise OSError(28, "No space left on device", item.path)
        if text == "reject":
            yield Rejected("unwanted", "it says so")
        if text in ("nothing", "reject"):
            return
        with open(Path(item.path).parent / "log", "a") as log:
            log.write(item.key + "\n")
        image = write_image(out_dir, f"{item.key}.jpg", text.encode())
        for number in range(2 if text == "two" else 1):
            turn = Turn(
                images=(image,), user="What?", assistant=text.upper() if self.shout else text
            )
            yield Sample(id=f"{item.key}-{number}", source="words", conversations=(turn,))


def write_words(folder: Path, *texts: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_text(text)
    return folder


def digest(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def ids(result: ConversionResult, split: str = "train") -> list[str]:
    return [sample.id for sample in read_samples(result.files[split])]


# --- what comes out


def test_samples_come_in_the_order_of_items_one_file_a_split(tmp_path: Path) -> None:
    source = write_words(tmp_path / "src", *"abcdefgh", "two")
    (source / "val.txt").write_text("v")
    result = convert(Words(), source, tmp_path / "out", num_workers=2)
    assert result.counts == {"train": 10, "val": 1}
    assert ids(result) == [f"{n:03}.txt-0" for n in range(9)] + ["008.txt-1"]
    assert (result.num_items, result.num_reused, result.rejected) == (10, 0, {})
    assert result.rejected_file is None
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "dataset_card.md", "images", "manifest.json", "words_train.jsonl", "words_val.jsonl",
    ]  # fmt: skip


def test_output_is_the_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "src")
    truncate(root / "val/Biking/v_Biking_g10_c01.avi", 0.4)
    for workers in (0, 1, 3):
        convert(Ucf101(), root, tmp_path / f"out{workers}", num_workers=workers)
    expected = digest(tmp_path / "out0")
    assert len(expected) == 11 * 8 + 6
    assert digest(tmp_path / "out1") == expected
    assert digest(tmp_path / "out3") == expected


def test_nothing_disappears_unnamed(tmp_path: Path) -> None:
    source = write_words(tmp_path / "src", "a", "reject", "nothing", "raise", "reject", "b")
    result = convert(Words(), source, tmp_path / "out", num_workers=1)
    assert result.counts == {"train": 2}
    assert list(result.rejected.items()) == [
        ("unwanted", 2), ("converter_error", 1), ("no_sample", 1),
    ]  # fmt: skip
    assert result.rejected_file is not None
    assert result.rejected_file == tmp_path / "out/rejected.jsonl"
    rows = [json.loads(line) for line in result.rejected_file.read_text().splitlines()]
    assert [(row["item"], row["index"]) for row in rows] == [
        ("001.txt", 1), ("002.txt", 2), ("003.txt", 3), ("004.txt", 4),
    ]  # fmt: skip
    assert rows[0]["reason"] == "unwanted"
    assert rows[0]["detail"] == "it says so"
    assert rows[2]["detail"].startswith("KeyError at test_convert.py:")
    assert "no such label" in rows[2]["detail"]


def test_the_manifest_names_settings_counts_and_hashes(tmp_path: Path) -> None:
    source = write_words(tmp_path / "src", "a", "b", "reject")
    convert(Words(shout=True), source, tmp_path / "out", num_workers=0, limit=2)
    text = (tmp_path / "out/manifest.json").read_text()
    manifest = json.loads(text)
    assert manifest["run"]["converter"] == "words"
    assert manifest["run"]["settings"] == {"shout": True}
    assert (manifest["run"]["num_items"], manifest["num_items"]) == (3, 2)
    assert manifest["counts"] == {"train": 2}
    facts = manifest["files"]["words_train.jsonl"]
    assert facts["sha256"] == digest(tmp_path / "out")["words_train.jsonl"]
    assert str(tmp_path) not in text


def test_a_process_that_dies_costs_its_item_only(tmp_path: Path) -> None:
    source = write_words(tmp_path / "src", "a", "b", "die", "c", "d", "e")
    result = convert(Words(), source, tmp_path / "out", num_workers=2)
    assert result.counts == {"train": 5}
    assert result.rejected == {"worker_died": 1}


def test_a_full_disk_stops_the_run_and_keeps_what_is_finished(tmp_path: Path) -> None:
    source = write_words(tmp_path / "src", "a", "b", "full")
    with pytest.raises(OSError, match="No space left"):
        convert(Words(), source, tmp_path / "out", num_workers=0)
    assert not (tmp_path / "out/words_train.jsonl").exists()
    (source / "002.txt").write_text("free")
    result = convert(Words(), source, tmp_path / "out", num_workers=0)
    assert (result.counts, result.num_reused) == ({"train": 3}, 2)


def test_a_converter_that_raises_is_shown_with_its_traceback(tmp_path: Path) -> None:
    source = write_words(tmp_path / "src", "a", "raise", "b", "raise")
    result = convert(Words(), source, tmp_path / "out", num_workers=1)
    assert result.counts == {"train": 2}
    (fault,) = result.faults  # one place, however often
    assert fault.item == "001.txt"
    assert fault.traceback[-1].startswith("test_convert.py:")
    assert fault.traceback[-1].endswith('in convert: raise KeyError("no such label")')
    rows = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert [row["traceback"] for row in rows] == [list(fault.traceback)] * 2
    assert str(tmp_path) not in (tmp_path / "out/rejected.jsonl").read_text()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_converter_that_raises_stops_the_run_where_that_is_asked_for(
    tmp_path: Path, num_workers: int
) -> None:
    source = write_words(tmp_path / "src", "a", "raise", "b")
    with pytest.raises(ConverterError, match=r"001.txt: KeyError(.|\n)*in convert: raise KeyError"):
        convert(Words(), source, tmp_path / "out", num_workers=num_workers, on_error="stop")
    assert not (tmp_path / "out/manifest.json").exists()
    (source / "001.txt").write_text("right")  # repaired: what was finished is kept
    result = convert(Words(), source, tmp_path / "out", num_workers=0, on_error="stop")
    assert result.counts == {"train": 3}
    assert result.num_reused >= (num_workers == 0)  # two workers may meet the second item first


# --- a part of it


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_limit_counts_samples_and_leaves_nothing_beyond_it(
    tmp_path: Path, num_workers: int
) -> None:
    texts = ["reject", "two", "a", "two", "reject", *"bcdefghij"]
    source = write_words(tmp_path / "src", *texts)
    result = convert(Words(), source, tmp_path / "out", num_workers=num_workers, limit=4)
    assert ids(result) == ["001.txt-0", "001.txt-1", "002.txt-0", "003.txt-0"]
    assert (result.counts, result.rejected, result.num_items) == ({"train": 4}, {"unwanted": 1}, 4)
    images = sorted(path.name for path in (tmp_path / "out/images").iterdir())
    assert images == ["001.txt.jpg", "002.txt.jpg", "003.txt.jpg"]


def test_a_limit_gives_the_same_bytes_however_it_was_reached(tmp_path: Path) -> None:
    source = write_words(tmp_path / "src", "two", "full", "two", *"abcdefgh")
    with pytest.raises(OSError, match="No space"):
        convert(Words(), source, tmp_path / "resumed", num_workers=0, limit=5)
    (source / "001.txt").write_text("free")
    for workers, name in ((0, "none"), (3, "three"), (1, "resumed")):
        result = convert(Words(), source, tmp_path / name, num_workers=workers, limit=5)
        assert result.counts == {"train": 5}
    assert digest(tmp_path / "none") == digest(tmp_path / "three") == digest(tmp_path / "resumed")


def test_a_limit_beyond_what_there_is_takes_all(tmp_path: Path) -> None:
    source = write_words(tmp_path / "src", "a", "reject", "two")
    result = convert(Words(), source, tmp_path / "out", num_workers=0, limit=100)
    assert (result.counts, result.rejected) == ({"train": 3}, {"unwanted": 1})


def test_splits_are_converted_by_name(tmp_path: Path) -> None:
    source = write_words(tmp_path / "src", "a", "b")
    (source / "val.txt").write_text("v")
    result = convert(Words(), source, tmp_path / "out", num_workers=0, splits=["val"])
    assert result.counts == {"val": 1}
    assert not (tmp_path / "out/words_train.jsonl").exists()
    with pytest.raises(ValueError, match=r"no split named 'dev' in .*: it has train, val"):
        convert(Words(), source, tmp_path / "other", num_workers=0, splits=["dev"])
    with pytest.raises(ValueError, match=r"splits was \['val'\], now \['train'\]"):
        convert(Words(), source, tmp_path / "out", num_workers=0, splits=["train"])


# --- what is refused, with nothing written


def test_a_missing_source_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"source not found: .*nowhere; expected a folder"):
        convert(Ucf101(), tmp_path / "nowhere", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_source_without_items_writes_nothing(tmp_path: Path) -> None:
    source = write_words(tmp_path / "src")
    with pytest.raises(ValueError, match="words found no item in"):
        convert(Words(), source, tmp_path / "out")
    with pytest.raises(ValueError, match="no videos found"):
        convert(Ucf101(), source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_images_of_other_origin_are_not_touched(tmp_path: Path) -> None:
    source = write_words(tmp_path / "src", "a")
    (tmp_path / "out/images").mkdir(parents=True)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds images of other origin"):
            convert(Words(), source, tmp_path / "out", overwrite=overwrite)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="out_dir is a file"):
        convert(Words(), source, tmp_path / "file")


def test_keys_and_indices_must_be_unique(tmp_path: Path) -> None:
    class Twice(Words):
        def discover(self, source: Path) -> Iterator[Item]:
            yield Item(0, "a", "a")
            yield Item(1, "a", "a")

    with pytest.raises(ValueError, match="2 items have the key 'a'"):
        convert(Twice(), tmp_path, tmp_path / "out", num_workers=0)


def test_a_converter_that_cannot_reach_a_process_is_refused(tmp_path: Path) -> None:
    class Local(Words):
        pass

    source = write_words(tmp_path / "src", "a")
    with pytest.raises(ValueError, match="cannot go to worker processes"):
        convert(Local(), source, tmp_path / "out", num_workers=1)
    assert convert(Local(), source, tmp_path / "out", num_workers=0).counts == {"train": 1}


def test_two_runs_never_write_to_one_folder(tmp_path: Path) -> None:
    class Nested(Words):
        def convert(self, item: Item, out_dir: Path) -> Iterator[Sample | Rejected]:
            convert(Words(), tmp_path / "src", out_dir, num_workers=0)
            yield from ()

    source = write_words(tmp_path / "src", "a")
    result = convert(Nested(), source, tmp_path / "out", num_workers=0)
    assert result.rejected == {"converter_error": 1}
    assert "another conversion is writing" in (tmp_path / "out/rejected.jsonl").read_text()


# --- resuming


def test_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    source = write_words(tmp_path / "src", "a", "reject", "b")
    first = convert(Words(), source, tmp_path / "out", num_workers=0)
    before = digest(tmp_path)
    again = convert(Words(), source, tmp_path / "out", num_workers=0)
    assert again.num_reused == 3
    assert (again.counts, again.rejected, again.files) == (
        first.counts, first.rejected, first.files,
    )  # fmt: skip
    assert digest(tmp_path) == before


def test_other_settings_or_another_source_are_refused_and_named(tmp_path: Path) -> None:
    source = write_words(tmp_path / "src", "a", "full")
    with pytest.raises(OSError, match="No space"):
        convert(Words(), source, tmp_path / "out", num_workers=0)
    (source / "001.txt").write_text("fine")

    def assert_refused(converter: Converter, match: str) -> None:
        before = digest(tmp_path)
        with pytest.raises(ValueError, match=match):
            convert(converter, source, tmp_path / "out", num_workers=0)
        assert digest(tmp_path) == before

    for _ in ("half done", "finished"):
        assert_refused(
            Words(shout=True), "another conversion: setting shout was False, now True.*--overwrite"
        )
        (source / "002.txt").write_text("more")
        assert_refused(Words(), r"the source is another \(2 items then, 3 now\)")
        (source / "002.txt").unlink()
        (source / "000.txt").write_text("longer")
        assert_refused(Words(), r"the source is another \(names or sizes differ\)")
        (source / "000.txt").write_text("a")
        convert(Words(), source, tmp_path / "out", num_workers=0)


def test_overwrite_starts_anew_and_leaves_nothing_old(tmp_path: Path) -> None:
    source = write_words(tmp_path / "src", "a", "b", "reject")
    convert(Words(), source, tmp_path / "out", num_workers=0)
    (tmp_path / "out/notes.md").write_text("mine")
    (source / "001.txt").unlink()
    (source / "002.txt").unlink()
    result = convert(Words(shout=True), source, tmp_path / "out", num_workers=0, overwrite=True)
    assert (result.counts, result.num_reused) == ({"train": 1}, 0)
    assert sorted(digest(tmp_path / "out")) == [
        "dataset_card.md", "images/000.txt.jpg", "manifest.json", "notes.md", "words_train.jsonl",
    ]  # fmt: skip


def test_an_output_that_changed_since_is_not_taken_for_finished(tmp_path: Path) -> None:
    source = write_words(tmp_path / "src", "a")
    convert(Words(), source, tmp_path / "out", num_workers=0)
    (tmp_path / "out/words_train.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"words_train.jsonl is gone or has changed"):
        convert(Words(), source, tmp_path / "out", num_workers=0)


def test_a_torn_journal_and_lost_images_are_made_good(tmp_path: Path) -> None:
    source = write_words(tmp_path / "src", "a", "b", "c", "full")
    with pytest.raises(OSError, match="No space"):
        convert(Words(), source, tmp_path / "out", num_workers=0)
    journal = tmp_path / "out/.convert/journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-5])  # the last line, item 2
    (tmp_path / "out/images/001.txt.jpg").write_bytes(b"")  # as after a power cut
    (source / "003.txt").write_text("fine")
    result = convert(Words(), source, tmp_path / "out", num_workers=0)
    assert (result.counts, result.num_reused) == ({"train": 4}, 1)
    convert(Words(), source, tmp_path / "clean", num_workers=0)
    assert digest(tmp_path / "out") == digest(tmp_path / "clean")


SLOW = """
    import os, time
    from pathlib import Path
    from phi3v_data import Item, Sample, Turn
    from phi3v_data.converters import write_image

    class Slow:
        name = "slow"
        def __init__(self, seconds=0.02): self.seconds = seconds
        def discover(self, source):
            for index in range(int(os.environ["ITEMS"])):
                yield Item(index, f"{index:02}", str(source))
        def convert(self, item, out_dir):
            with open(Path(item.path) / "log", "a") as log:
                log.write(os.environ["RUN"] + " " + item.key + "\\n")
            images = []
            for k in range(3):
                time.sleep(self.seconds / 3)
                images.append(write_image(out_dir, f"{item.key}.{k}.jpg", item.key.encode() * 999))
            turn = Turn(images=tuple(images), user="?", assistant=item.key)
            yield Sample(id=item.key, source="slow", conversations=(turn,))
"""


def start_slow(folder: Path, out: str, run: int, num_items: int = 60) -> "subprocess.Popen[str]":
    (folder / "slow_converter.py").write_text(textwrap.dedent(SLOW))
    (folder / "src").mkdir(exist_ok=True)
    code = "from phi3v_data.cli import main; main()"
    command = [sys.executable, "-c", code, "convert", "slow_converter:Slow", "src"]
    return subprocess.Popen(
        [*command, "--out_dir", out, "--workers", "2"],
        cwd=folder,
        env=os.environ | {"RUN": str(run), "ITEMS": str(num_items)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # its own group, as a terminal gives it
    )


def journaled(folder: Path) -> list[str]:
    path = folder / "out/.convert/journal.jsonl"
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[1:-1]  # neither the header nor a torn last line
    return [f"{json.loads(line)['index']:02}" for line in lines]


def wait_until_journaled(folder: Path, number: int) -> None:
    deadline = time.monotonic() + 60
    while len(journaled(folder)) < number:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.005)


def group_is_gone(process: "subprocess.Popen[str]", seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def assert_finished_once_and_whole(
    folder: Path, stops: list[list[str]], num_items: int = 60
) -> None:
    """`stops[n]` is what the journal held after run n: no later run may convert those again."""
    log = [line.split() for line in (folder / "src/log").read_text().splitlines()]
    assert {key for _, key in log} == {f"{index:02}" for index in range(num_items)}
    for run, finished in enumerate(stops):
        assert not [key for later, key in log if int(later) > run and key in finished]
    process = start_slow(folder, "clean", run=99, num_items=num_items)
    assert process.wait(60) == 0, process.communicate()
    assert digest(folder / "out") == digest(folder / "clean")


@pytest.mark.parametrize(
    "num_kills", [10, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.long])]
)
def test_kill_9_at_random_moments_loses_nothing_finished(tmp_path: Path, num_kills: int) -> None:
    rng, num_items = random.Random(num_kills), num_kills * 15
    stops: list[list[str]] = []
    for _ in range(num_kills):
        process = start_slow(tmp_path, "out", len(stops), num_items)
        # Some while the processes start, some after a few more items.
        wait_until_journaled(tmp_path, len(stops[-1] if stops else []) + rng.randint(0, 6))
        time.sleep(rng.random() * 0.1)
        process.kill()  # the main process only: its workers must go by themselves
        process.wait()
        assert group_is_gone(process), "worker processes outlive their parent"
        stops.append(journaled(tmp_path))
        assert not list((tmp_path / "out").glob("*.jsonl"))
        assert not (tmp_path / "out/manifest.json").exists()
    assert num_kills < len(stops[-1]) < num_items
    process = start_slow(tmp_path, "out", len(stops), num_items)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert f"{len(stops[-1])} items were finished by an earlier run" in stdout
    assert_finished_once_and_whole(tmp_path, stops, num_items)


def test_ctrl_c_says_how_to_continue_and_loses_nothing_finished(tmp_path: Path) -> None:
    process = start_slow(tmp_path, "out", run=0)
    wait_until_journaled(tmp_path, 5)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    stdout, stderr = process.communicate(timeout=20)
    done = journaled(tmp_path)
    assert process.returncode == 130
    assert stderr == (
        f"interrupted: {len(done)} of 60 items done; run the same command again to continue\n"
    )
    assert stdout == ""
    assert group_is_gone(process)
    process = start_slow(tmp_path, "out", run=1)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert_finished_once_and_whole(tmp_path, [done])


# --- archives


def write_archive(path: Path, root: Path, *extra: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member in extra:
            tar.addfile(member, io.BytesIO(b"x" * member.size) if member.size else None)
        if root.exists():
            tar.add(root, arcname="UCF101_subset")
    return path


def make_member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    member.size = 4 if kind == tarfile.REGTYPE else 0
    return member


def test_an_archive_gives_the_same_output_as_its_folder(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "src", 1)
    archive = write_archive(tmp_path / "UCF101_subset.tar.gz", root)
    convert(Ucf101(), root, tmp_path / "a", num_workers=0)
    result = convert(Ucf101(), archive, tmp_path / "b", num_workers=0)
    a, b = digest(tmp_path / "a"), digest(tmp_path / "b")
    for name in ("manifest.json", "dataset_card.md"):  # they name the archive's hash
        assert a.pop(name) != b.pop(name)
    assert a == b
    assert not (tmp_path / "b/.convert").exists()
    assert convert(Ucf101(), archive, tmp_path / "b").num_reused == result.num_items == 6


@pytest.mark.parametrize(
    "member",
    [
        make_member("../evil.avi"),
        make_member("/tmp/phi3v_evil.avi"),
        make_member("a/../../evil.avi"),
        make_member("link", tarfile.SYMTYPE, "/etc"),
        make_member("hard", tarfile.LNKTYPE, "/etc/passwd"),
        make_member("fifo", tarfile.FIFOTYPE),
        make_member("dev", tarfile.CHRTYPE),
    ],
    ids=lambda member: member.name,
)
def test_an_archive_that_reaches_outside_is_refused_and_nothing_written(
    tmp_path: Path, member: tarfile.TarInfo
) -> None:
    archive = write_archive(tmp_path / "a.tar.gz", tmp_path / "none", member)
    with pytest.raises(
        ValueError, match=r"refused archive: its member .*(outside|link or a device)"
    ):
        convert(Ucf101(), archive, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]


@pytest.mark.parametrize("fraction", [0, 0.3, 0.9])
def test_a_damaged_archive_is_refused_and_nothing_written(tmp_path: Path, fraction: float) -> None:
    root = write_tree(tmp_path / "src", 1)
    archive = truncate(write_archive(tmp_path / "a.tar.gz", root), fraction)
    with pytest.raises(ValueError, match=r"a.tar.gz is damaged or no tar archive"):
        convert(Ucf101(), archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_archive_without_videos_leaves_nothing(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "a.tar.gz", tmp_path / "none", make_member("a.txt"))
    with pytest.raises(ValueError, match="no videos found"):
        convert(Ucf101(), archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the package's door, and the example


def test_convert_is_reached_from_the_package(tmp_path: Path) -> None:
    source = write_words(tmp_path / "src", "a")
    assert phi3v_data.convert(Words(), source, tmp_path / "out", num_workers=0).num_items == 1


def write_captions(folder: Path) -> Path:
    (folder / "raw").mkdir()
    for name in ("cat.jpg", "dog.jpg"):
        (folder / "raw" / name).write_bytes(b"jpeg of " + name.encode())
    (folder / "raw/captions.txt").write_text("cat.jpg\tA cat.\ngone.jpg\tNo.\ndog.jpg\tA dog.\n")
    return folder


def test_the_example_runs_as_a_script(tmp_path: Path) -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 25
    subprocess.run([sys.executable, EXAMPLE], cwd=write_captions(tmp_path), check=True, timeout=60)
    samples = list(read_samples(tmp_path / "converted/captions_train.jsonl"))
    assert [sample.conversations[0].assistant for sample in samples] == ["A cat.", "A dog."]
    assert "FileNotFoundError" in (tmp_path / "converted/rejected.jsonl").read_text()


def test_a_script_without_a_main_guard_gets_a_clear_error(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    text = EXAMPLE.read_text().replace('if __name__ == "__main__":', "if True:")
    write_captions(tmp_path)
    script.write_text(text)
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert 'needs `if __name__ == "__main__":` around the call' in done.stderr
