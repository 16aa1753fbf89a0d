"""Sources and outputs at addresses, against a real S3-compatible server on this machine."""

import contextlib
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import s3fs
from click.testing import CliRunner
from fsspec.implementations.memory import MemoryFileSystem
from phi3v_data.cli import main
from phi3v_data.conversion.remote_output import RemoteOutput
from phi3v_data.conversion.source_copy import SourceCopy, fingerprint
from phi3v_data.conversion.trouble import StoreError
from phi3v_data.convert import Interrupted, convert
from phi3v_data.converters import Converter, write_image
from phi3v_data.converters.ucf101 import Ucf101

from tests.data.clips import write_tree
from tests.data.notes import Notes, write_notes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)  # for workers
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("MARKER", str(tmp_path / "marker"))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A server with empty memory; s3fs finds it through the environment, in workers too."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(server: str) -> str:
    """A new one, as an address."""
    name = f"bucket-{uuid.uuid4().hex}"
    store("s3://x").mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def memory() -> str:
    return f"memory://{uuid.uuid4().hex}"


def store(address: str) -> Any:
    file_system, _ = fsspec.core.url_to_fs(address, use_listings_cache=False)
    return file_system


def upload(folder: Path, address: str) -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            put(f"{address}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return address


def put(address: str, content: bytes) -> None:
    store(address).pipe_file(address, content)


def contents(where: Path | str) -> dict[str, bytes]:
    """Relative name → bytes of everything in a folder or below an address."""
    if isinstance(where, Path):
        files = [path for path in where.rglob("*") if path.is_file()]
        return {path.relative_to(where).as_posix(): path.read_bytes() for path in files}
    file_system, root = fsspec.core.url_to_fs(where, use_listings_cache=False)
    found: dict[str, Any] = file_system.find(root, detail=True)
    files = [path for path, facts in found.items() if facts["type"] == "file"]
    return {path.removeprefix(f"{root}/"): file_system.cat_file(path) for path in files}


def without_source(files: dict[str, bytes], address: str | None = None) -> dict[str, bytes]:
    """The same without the hash of the source at an address, where it is named."""
    digest = fingerprint(address) if address else None
    manifest = json.loads(files["manifest.json"])
    assert manifest["run"].pop("source") == digest
    del manifest["files"]["dataset_card.md"]
    card = files["dataset_card.md"].decode().replace(f"As it came: `{digest}`.\n\n", "")
    manifest_bytes = json.dumps(manifest).encode()
    return files | {"manifest.json": manifest_bytes, "dataset_card.md": card.encode()}


def local_run(converter: Converter, source: Path, out: Path, **options: Any) -> dict[str, bytes]:
    convert(converter, source, out, num_workers=0, **options)
    (Path(os.environ["LOG"])).unlink(missing_ok=True)
    return contents(out)


def logged() -> list[str]:
    log = Path(os.environ["LOG"])
    keys = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return sorted(keys)


# --- the same bytes


@pytest.mark.parametrize("workers", [0, 2])
def test_clips_from_a_store_to_a_store_give_what_they_give_here(
    tmp_path: Path, bucket: str, workers: int
) -> None:
    source = write_tree(tmp_path / "src", 1)
    expected = local_run(Ucf101(), source, tmp_path / "out")
    address = upload(source, f"{bucket}/raw")
    result = convert(Ucf101(), address, f"{bucket}/a/out", num_workers=workers)
    assert without_source(contents(f"{bucket}/a/out"), address) == without_source(expected)
    assert len(expected) == 6 * 8 + 5
    assert result.files["train"] == f"{bucket}/a/out/ucf101_train.jsonl"
    assert result.out_dir == f"{bucket}/a/out"
    assert not list((tmp_path / "cache/phi3v-data/convert").glob("*"))


@pytest.mark.parametrize(
    "workers", [0, pytest.param(2, marks=[pytest.mark.slow, pytest.mark.long])]
)
def test_a_folder_to_a_store_gives_every_byte_of_a_local_run(
    tmp_path: Path, bucket: str, workers: int
) -> None:
    source = write_notes(tmp_path / "src", *"abcd", "raise", *"efgh")
    expected = local_run(Notes(), source, tmp_path / "out")
    result = convert(Notes(), source, f"{bucket}/out", num_workers=workers)
    assert contents(f"{bucket}/out") == expected
    assert result.rejected_file == f"{bucket}/out/rejected.jsonl"
    assert len([name for name in expected if name.startswith("images/")]) == 2 * 8


@pytest.mark.parametrize(
    "workers", [0, pytest.param(2, marks=[pytest.mark.slow, pytest.mark.long])]
)
def test_a_store_to_a_folder_gives_the_bytes_of_a_local_run(
    tmp_path: Path, bucket: str, workers: int
) -> None:
    source = write_notes(tmp_path / "src", *"abcdefgh")
    expected = local_run(Notes(), source, tmp_path / "out")
    address = upload(source, f"{bucket}/raw")
    convert(Notes(), f"{address}/", tmp_path / "copied", num_workers=workers)
    assert without_source(contents(tmp_path / "copied"), address) == without_source(expected)


def test_memory_to_memory_gives_the_bytes_of_a_local_run(tmp_path: Path, memory: str) -> None:
    source = write_notes(tmp_path / "src", *"abcd", "raise")
    expected = local_run(Notes(), source, tmp_path / "out")
    address = upload(source, f"{memory}/raw")
    convert(Notes(), address, f"{memory}/out")  # without a number: no processes
    assert without_source(contents(f"{memory}/out"), address) == without_source(expected)
    convert(Notes(), source, f"{memory}/out2", num_workers=0)
    assert contents(f"{memory}/out2") == expected


def test_memory_is_refused_where_other_processes_would_write(tmp_path: Path, memory: str) -> None:
    source = write_notes(tmp_path / "src", "a")
    message = "is seen by this process only; choose another address, or num_workers=0"
    with pytest.raises(ValueError, match=message):
        convert(Notes(), source, memory, num_workers=2)
    with pytest.raises(ValueError, match=message):
        convert(Notes(), source, memory, engine="ray")


def test_a_limit_leaves_no_image_beyond_it(tmp_path: Path, bucket: str) -> None:
    source = write_notes(tmp_path / "src", "a", "interrupt", *"cdefgh")
    with pytest.raises(Interrupted):
        convert(Notes(), source, f"{bucket}/out", num_workers=0, limit=4)
    put(f"{bucket}/out/images/2/005.txt.0.jpg", b"what a killed worker was ahead")
    convert(Notes(), source, f"{bucket}/out", num_workers=0, limit=4)
    assert contents(f"{bucket}/out") == local_run(Notes(), source, tmp_path / "out", limit=4)


@pytest.mark.slow
@pytest.mark.long
def test_ray_from_a_store_to_a_store_gives_the_bytes_of_a_local_run(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    source = write_notes(tmp_path / "src", *"abcd", "raise", *"efgh")
    expected = local_run(Notes(), source, tmp_path / "out")
    address = upload(source, f"{bucket}/raw")
    convert(Notes(), address, f"{bucket}/out", engine="ray", num_workers=2)
    assert without_source(contents(f"{bucket}/out"), address) == without_source(expected)


# --- an archive, one file


def test_an_archive_in_a_store_gives_what_it_gives_here(tmp_path: Path, bucket: str) -> None:
    source = write_notes(tmp_path / "src", *"abc")
    archive = tmp_path / "notes.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, arcname="notes")
    convert(Notes(), archive, tmp_path / "out", num_workers=0)
    put(f"{bucket}/notes.tar.gz", archive.read_bytes())
    result = convert(Notes(), f"{bucket}/notes.tar.gz", tmp_path / "copied", num_workers=0)
    name = "notes_train.jsonl"
    assert result.counts == {"train": 3}
    assert contents(tmp_path / "copied")[name] == contents(tmp_path / "out")[name]
    assert not (tmp_path / "copied/.convert").exists()


def test_one_file_in_a_store_keeps_its_name(tmp_path: Path, bucket: str) -> None:
    put(f"{bucket}/raw/val.jsonl", b"{}\n")
    copy = SourceCopy(f"{bucket}/raw/val.jsonl", str(tmp_path / "copy"))
    assert copy.ensure().read_bytes() == b"{}\n"
    assert copy.ensure().name == "val.jsonl"


# --- interrupted


@pytest.mark.parametrize("is_lost", [False, True], ids=["same machine", "another machine"])
def test_ctrl_c_loses_nothing_finished(tmp_path: Path, bucket: str, is_lost: bool) -> None:
    source = write_notes(tmp_path / "src", "a", "b", "c", "d", "interrupt")
    expected = clean_run_of_interrupted(source, tmp_path)
    with pytest.raises(Interrupted, match="3 of 5 items done"):
        convert(Notes(), source, f"{bucket}/out", num_workers=0)
    done = logged()
    assert done == ["0/000.txt", "0/003.txt", "1/001.txt"]
    assert "manifest.json" not in contents(f"{bucket}/out")
    if is_lost:
        shutil.rmtree(tmp_path / "cache")
    result = convert(Notes(), source, f"{bucket}/out", num_workers=0)
    assert result.num_reused == len(done)
    assert not set(logged()) & set(done)
    assert contents(f"{bucket}/out") == expected


def clean_run_of_interrupted(source: Path, tmp_path: Path) -> dict[str, bytes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MARKER", str(tmp_path / "clean-marker"))
        for index in range(10):
            (tmp_path / f"clean-marker-{index}").touch()
        return local_run(Notes(), source, tmp_path / "clean")


SCRIPT = """
import sys
from phi3v_data import convert
from phi3v_data.conversion import journal
from tests.data.notes import Notes
journal.BACK_UP_SECONDS = 0.1
if __name__ == "__main__":
    convert(Notes(), sys.argv[1], sys.argv[2], num_workers=int(sys.argv[3]))
"""


def finished_in(address: str) -> set[str]:
    """Ids in the journal that was put away."""
    files = contents(f"{address}/.convert")
    journal = b"".join(files[name] for name in sorted(files))
    lines = [json.loads(line) for line in journal.splitlines()[1:]]
    return {json.loads(sample)["id"] for line in lines for sample in line["samples"]}


@pytest.mark.parametrize(
    "is_lost",
    [
        pytest.param(False, marks=[pytest.mark.slow, pytest.mark.long], id="same machine"),
        pytest.param(True, id="another machine"),
    ],
)
def test_kill_9_loses_nothing_that_was_put_away(tmp_path: Path, bucket: str, is_lost: bool) -> None:
    source = write_notes(tmp_path / "src", *[f"note {number}" for number in range(16)])
    expected = local_run(Notes(), source, tmp_path / "clean")
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", source, f"{bucket}/out", "2" if is_lost else "0"],
        cwd=tmp_path,
        env=os.environ | {"SECONDS": "0.5", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while len(done := finished_in(f"{bucket}/out")) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done |= finished_in(f"{bucket}/out")
    logged()
    assert "manifest.json" not in contents(f"{bucket}/out")
    if is_lost:
        shutil.rmtree(tmp_path / "cache")
    result = convert(Notes(), source, f"{bucket}/out", num_workers=0)
    assert result.num_reused >= len(done)
    assert not set(logged()) & done
    assert contents(f"{bucket}/out") == expected
    assert not list((tmp_path / "cache/phi3v-data/convert").glob("*"))


def test_where_another_machine_went_on_its_journal_counts(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_notes(tmp_path / "src", "a", "b", "interrupt", "c", "interrupt", "d")
    expected = clean_run_of_interrupted(source, tmp_path)
    done: set[str] = set()
    for machine, reused in (("one", 0), ("other", 3), ("one", 4)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        before, is_last = done, reused == 4
        if is_last:
            assert convert(Notes(), source, f"{bucket}/out", num_workers=0).num_reused == reused
        else:
            with pytest.raises(Interrupted, match=f"{4 if reused else 3} of 6 items"):
                convert(Notes(), source, f"{bucket}/out", num_workers=0)
        done = set(logged())
        assert not done & before
        done |= before
    assert contents(f"{bucket}/out") == expected


class Flaky(MemoryFileSystem):
    """Memory that fails once, after some files came or went."""

    protocol = "flaky"
    store: dict[str, Any] = {}  # noqa: RUF012 - declared so by the class above it
    fetched: ClassVar[list[str]] = []
    calls_left = 0

    def _count(self) -> None:
        Flaky.calls_left -= 1
        if Flaky.calls_left == 0:
            raise ConnectionError("the line was cut")

    def get_file(self, rpath: str, *arguments: Any, **options: Any) -> None:
        self._count()
        super().get_file(rpath, *arguments, **options)
        Flaky.fetched.append(rpath)

    def put_file(self, *arguments: Any, **options: Any) -> None:
        self._count()
        super().put_file(*arguments, **options)


@pytest.fixture
def flaky() -> str:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.calls_left = 0
    Flaky.fetched.clear()
    return f"flaky://{uuid.uuid4().hex}"


def test_what_was_fetched_before_the_line_was_cut_is_not_fetched_again(
    tmp_path: Path, flaky: str
) -> None:
    source = write_notes(tmp_path / "src", *"abcdefgh" * 5)
    address = upload(source, f"{flaky}/raw")
    Flaky.calls_left = 21
    with pytest.raises(StoreError, match=r"flaky://.*/raw, file .*: the line was cut"):
        convert(Notes(), address, tmp_path / "out", num_workers=0)
    assert 20 <= len(Flaky.fetched) < 40
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".convert"]
    result = convert(Notes(), address, tmp_path / "out", num_workers=0)
    assert (result.counts, len(Flaky.fetched)) == ({"train": 40}, 40)
    assert len(set(Flaky.fetched)) == 40
    assert not (tmp_path / "out/.convert").exists()


def test_a_cut_line_stops_the_run_and_rejects_nothing(tmp_path: Path, flaky: str) -> None:
    source = write_notes(tmp_path / "src", *"abcdefgh")
    expected = local_run(Notes(), source, tmp_path / "out")
    Flaky.calls_left = 8
    with pytest.raises(StoreError, match=r"flaky://.*/out/images/.*: the line was cut"):
        convert(Notes(), source, f"{flaky}/out", num_workers=0)
    assert convert(Notes(), source, f"{flaky}/out", num_workers=0).num_reused == 3
    assert contents(f"{flaky}/out") == expected


# --- what is there already


def test_a_finished_run_is_known_and_its_source_not_fetched_again(
    tmp_path: Path, flaky: str
) -> None:
    address = upload(write_notes(tmp_path / "src", *"abc"), f"{flaky}/raw")
    convert(Notes(), address, f"{flaky}/out", num_workers=0)
    before, Flaky.fetched[:] = contents(f"{flaky}/out"), []
    result = convert(Notes(), address, f"{flaky}/out", num_workers=0)
    assert (result.num_reused, result.counts) == (3, {"train": 3})
    assert (contents(f"{flaky}/out"), Flaky.fetched) == (before, [])


def test_a_source_that_changed_is_another(tmp_path: Path, bucket: str) -> None:
    source = write_notes(tmp_path / "src", *"abc")
    address = upload(source, f"{bucket}/raw")
    convert(Notes(), address, f"{bucket}/out", num_workers=0)
    put(f"{address}/0/000.txt", b"z")  # the same size
    with pytest.raises(ValueError, match="the source is another"):
        convert(Notes(), address, f"{bucket}/out", num_workers=0)
    result = convert(Notes(), address, f"{bucket}/out", num_workers=0, overwrite=True)
    assert result.num_reused == 0
    assert b'"z"' in contents(f"{bucket}/out")["notes_train.jsonl"]


def test_an_interrupted_run_begun_anew_reads_the_source_as_it_is_now(
    tmp_path: Path, bucket: str
) -> None:
    address = upload(write_notes(tmp_path / "src", "a", "interrupt"), f"{bucket}/raw")
    with pytest.raises(Interrupted):
        convert(Notes(), address, f"{bucket}/out", num_workers=0)
    put(f"{address}/0/000.txt", b"z")
    convert(Notes(), address, f"{bucket}/out", num_workers=0, overwrite=True)
    files = contents(f"{bucket}/out")
    assert b'"z"' in files["notes_train.jsonl"]
    assert not [name for name in files if name.startswith(".convert")]


def test_images_of_another_origin_are_refused_and_stay(tmp_path: Path, bucket: str) -> None:
    source = write_notes(tmp_path / "src", "a")
    put(f"{bucket}/out/images/mine.jpg", b"x")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds images of other origin"):
            convert(Notes(), source, f"{bucket}/out", num_workers=0, overwrite=overwrite)
    assert contents(bucket) == {"out/images/mine.jpg": b"x"}


def test_overwrite_removes_what_an_earlier_run_left(tmp_path: Path, bucket: str) -> None:
    convert(Notes(), write_notes(tmp_path / "a", *"abc"), f"{bucket}/out", num_workers=0)
    put(f"{bucket}/outer/images/x.jpg", b"a neighbour whose name begins alike")
    source = write_notes(tmp_path / "b", "z")
    with pytest.raises(ValueError, match="holds another conversion"):
        convert(Notes(), source, f"{bucket}/out", num_workers=0)
    convert(Notes(), source, f"{bucket}/out", num_workers=0, overwrite=True)
    assert contents(f"{bucket}/out") == local_run(Notes(), source, tmp_path / "out")
    assert len(contents(f"{bucket}/outer")) == 1


def test_two_runs_into_one_address_from_here_are_refused(tmp_path: Path, bucket: str) -> None:
    from phi3v_data.convert import _work_folder

    source = write_notes(tmp_path / "src", "a")
    with (
        _work_folder(RemoteOutput(f"{bucket}/out")),
        pytest.raises(ValueError, match="another conversion is writing"),
    ):
        convert(Notes(), source, f"{bucket}/out", num_workers=0)


# --- hostile, empty, missing


def put_key(address: str, key: str) -> None:
    """Past every client, which would straighten the key."""
    from moto.s3.models import s3_backends

    backend = s3_backends["123456789012"]["aws"]
    backend.put_object(address.removeprefix("s3://"), key, b"x")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["raw/../../evil.txt"], "would land outside"),
        (["raw//etc/evil.txt"], "would land outside"),
        (["raw/a//b.txt"], "no such name on a disk"),
        (["raw/./b.txt"], "no such name on a disk"),
        (["raw/a", "raw/a/b.txt"], "is a file and a folder"),
    ],
)
def test_keys_that_are_no_file_names_are_refused_and_nothing_written(
    tmp_path: Path, bucket: str, keys: list[str], message: str
) -> None:
    for key in ["raw/good.txt", *keys]:
        put_key(bucket, key)
    with pytest.raises(ValueError, match=message):
        convert(Notes(), f"{bucket}/raw", tmp_path / "out", num_workers=0)
    assert list(tmp_path.iterdir()) == []


def test_an_archive_in_a_store_that_is_damaged_leaves_nothing(tmp_path: Path, bucket: str) -> None:
    put(f"{bucket}/a.tar.gz", b"no archive")
    with pytest.raises(ValueError, match=r"a\.tar\.gz is damaged or no tar archive"):
        convert(Notes(), f"{bucket}/a.tar.gz", tmp_path / "out", num_workers=0)
    assert list(tmp_path.iterdir()) == []


def test_empty_objects_that_stand_for_folders_are_no_files(tmp_path: Path, bucket: str) -> None:
    put_key(bucket, "raw/")
    put_key(bucket, "raw/0/")
    put_key(bucket, "raw/0/a.txt")
    copy = SourceCopy(f"{bucket}/raw", str(tmp_path / "copy")).ensure()
    assert contents(copy) == {"0/a.txt": b"x"}


def test_what_is_not_there_is_said_in_one_line(tmp_path: Path, bucket: str) -> None:
    source = write_notes(tmp_path / "src", "a")
    for where, out, message in [
        (f"{bucket}/none", tmp_path / "out", "source not found: nothing is at s3://"),
        ("s3://nobucket/x", tmp_path / "out", "source not found: nothing is at s3://nobucket/x"),
        ("s3://", tmp_path / "out", "s3:// names no folder"),
        ("nosuch://x/y", tmp_path / "out", "cannot open nosuch://x/y: Protocol not known"),
        (f"file://{source}", tmp_path / "out", "is on this machine; give its path"),
        (source, "s3://nobucket/x", "there is no bucket for s3://nobucket/x: .* make it first"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert(Notes(), where, out, num_workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.fixture
def nobody(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Someone without credentials."""
    s3fs.S3FileSystem.clear_instance_cache()  # they are kept with them
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def run_command(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["convert", "video", *arguments, "--workers", "0"])
    return result.exit_code, result.stderr


def test_the_command_says_in_one_line_that_a_bucket_is_missing(tmp_path: Path, server: str) -> None:
    status, errors = run_command("s3://nobucket/x", "--out_dir", str(tmp_path / "out"))
    assert (status, errors.count("\n")) == (2, 1)
    assert errors.startswith("Error: source not found: nothing is at s3://nobucket/x (The spec")


@pytest.mark.usefixtures("nobody")
def test_the_command_says_in_one_line_that_there_are_no_credentials(tmp_path: Path) -> None:
    write_tree(tmp_path / "src", 1)
    status, errors = run_command(str(tmp_path / "src"), "--out_dir", "s3://bucket/x")
    assert (status, errors.count("\n")) == (1, 1)
    assert "s3://bucket/x/.convert: no access, check the credentials (Unable to loc" in errors


def test_without_the_package_of_a_store_its_extra_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pip install 'phi3v-data\[gcs\]'"):
        convert(Notes(), "gs://bucket/x", tmp_path / "out", num_workers=0)


def test_wrong_credentials_are_named(tmp_path: Path, server: str, bucket: str) -> None:
    import urllib.request

    def refuse_after(requests: str) -> None:
        call = urllib.request.Request(
            f"{server}/moto-api/reset-auth",
            data=requests.encode(),
            headers={"Content-Type": "text/plain"},
        )
        urllib.request.urlopen(call).read()

    source = write_notes(tmp_path / "src", "a")
    refuse_after("0")
    try:
        with pytest.raises(StoreError, match=r"no access, check the credentials \(The AWS Access"):
            convert(Notes(), source, f"{bucket}/out", num_workers=0)
        with pytest.raises(StoreError, match=r"no access, check the credentials \(The AWS Access"):
            convert(Notes(), f"{bucket}/raw", tmp_path / "out", num_workers=0)
    finally:
        refuse_after("inf")


# --- whole or not at all


def test_what_is_broken_off_puts_nothing(bucket: str) -> None:
    output = RemoteOutput(f"{bucket}/out")
    for block in (output.images(), output.open("a.jsonl")):
        with contextlib.suppress(KeyError), block as opened:
            if isinstance(opened, Path):
                write_image(opened, "a.jpg", b"x")
            else:
                opened.write(b"x")
            raise KeyError
    assert contents(bucket) == {}
    assert list(output.work.iterdir()) == []


# --- what it costs


def test_images_of_a_journal_are_listed_not_asked_for_one_by_one(
    tmp_path: Path, flaky: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(30):
        put(f"{flaky}/out/images/{number}.jpg", b"x" * number)
    asked: list[str] = []
    monkeypatch.setattr(Flaky, "info", lambda self, path, **_: asked.append(path))
    output = RemoteOutput(f"{flaky}/out")
    assert [output.image_size(f"{number}.jpg") for number in range(31)] == [*range(30), None]
    assert asked == []
    assert len(pickle.dumps(output)) == len(pickle.dumps(RemoteOutput(output.address)))
