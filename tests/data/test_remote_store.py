"""Shards on object stores, against an S3-compatible server behind a proxy that fails at times."""

import hashlib
import json
import logging
import multiprocessing
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import s3fs
from fsspec import config as fsspec_config
from phi3v_data import Sample, Turn, open_shards, write_samples, write_shards
from phi3v_data.remote_store import RemoteStore, StoreSettings
from phi3v_data.shard_format import FileEntry, ShardEntry, ShardError, read_manifest
from phi3v_data.shard_store import open_store
from phi3v_data.store_retries import RetryPolicy
from PIL import Image

from tests.data.faulty_proxy import FaultyProxy

QUICK = RetryPolicy(num_tries=4, first_wait_s=0.01, longest_wait_s=0.05)
MEBIBYTE = 1 << 20
ROW = 50_000
"""Bytes of a toy row."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def proxy_of_module(server: str) -> Iterator[FaultyProxy]:
    """Clients find it through the environment, in other processes too."""
    with FaultyProxy(server) as proxy, pytest.MonkeyPatch.context() as patch:
        s3fs.S3FileSystem.clear_instance_cache()
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("NO_PROXY", "127.0.0.1")
        # The libraries below try again themselves; here every failure is ours to deal with.
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        patch.setattr(s3fs.S3FileSystem, "retries", 1)
        patch.setitem(fsspec_config.conf, "s3", {"config_kwargs": {"read_timeout": 1}})
        yield proxy
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def proxy(proxy_of_module: FaultyProxy) -> FaultyProxy:
    proxy = proxy_of_module
    proxy.faults.clear()
    proxy.met.clear()
    proxy.always, proxy.delay_s, proxy.suffix = "", 0.0, ".parquet"
    proxy.asked.clear()
    return proxy


@pytest.fixture
def bucket(proxy: FaultyProxy) -> str:
    name = f"bucket-{uuid.uuid4().hex}"
    file_system: Any = fsspec.filesystem("s3")
    file_system.mkdir(name)
    return f"s3://{name}"


def put(address: str, content: bytes) -> None:
    file_system, path = fsspec.core.url_to_fs(address)
    file_system.pipe_file(path, content)


def noise(num_bytes: int, seed: int = 0) -> bytes:
    return hashlib.shake_128(bytes([seed])).digest(num_bytes)


def put_shard(folder: str, content: bytes, number: int = 0) -> ShardEntry:
    name = f"shard-{number:05d}.parquet"
    put(f"{folder}/{name}", content)
    sha256 = hashlib.sha256(content).hexdigest()
    return ShardEntry(name=name, num_bytes=len(content), sha256=sha256, num_samples=1, num_images=1)


@pytest.fixture
def settings(tmp_path: Path) -> StoreSettings:
    return StoreSettings(cache=tmp_path / "cache", limit_bytes=100 * MEBIBYTE, retries=QUICK)


def rows_of(entry: ShardEntry) -> list[list[tuple[int, int]]]:
    """Two spans a row, a gap of 100 bytes between them."""
    half = ROW // 2
    return [[(start, half - 100), (start + half, half)] for start in range(0, entry.num_bytes, ROW)]


def read_all(store: RemoteStore, entry: ShardEntry) -> list[list[bytes]]:
    return [[bytes(view) for view in store.ranges(entry, row)] for row in rows_of(entry)]


def expected_of(content: bytes, entry: ShardEntry) -> list[list[bytes]]:
    return [[content[o : o + n] for o, n in row] for row in rows_of(entry)]


def wait_until(is_so: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("phi3v-prefetch")]


# --- requests and the cache


@pytest.mark.parametrize("kind", ["s3", "http", "memory"])
def test_ranges_are_the_bytes_of_the_shard(
    proxy: FaultyProxy, bucket: str, settings: StoreSettings, kind: str
) -> None:
    folder = f"memory://{uuid.uuid4().hex}/train" if kind == "memory" else f"{bucket}/train"
    content = noise(6 * ROW)
    entry = put_shard(folder, content)
    if kind == "http":
        key, folder = folder, f"{proxy.url}/{folder.removeprefix('s3://')}"
        with pytest.raises(ShardError, match=r"http://.* no access, check the credentials \(403"):
            RemoteStore(folder, settings).ranges(entry, [(0, 9)])
        file_system: Any = fsspec.filesystem("s3")
        file_system.chmod(f"{key}/{entry.name}", "public-read")
    for download in ("ranges", "shards"):
        store = RemoteStore(f"{folder}/", replace(settings, download=download))
        assert read_all(store, entry) == expected_of(content, entry)
        assert store.ranges(entry, [(7, 0), (5, 2), (0, 1)]) == [b"", content[5:7], content[:1]]
        assert store.ranges(entry, []) == []
        assert store.ranges(entry, [(0, 9)])[0].readonly
        store.close()


def test_near_spans_are_one_request_far_ones_two(
    proxy: FaultyProxy, bucket: str, settings: StoreSettings
) -> None:
    entry = put_shard(bucket, noise(3 * MEBIBYTE))
    store = RemoteStore(bucket, settings)
    store.ranges(entry, [(1000, 500), (0, 10), (2000, 8), (2 * MEBIBYTE, 5)])
    name = entry.name
    assert proxy.asked == [f"{name} 0-2007", f"{name} {2 * MEBIBYTE}-{2 * MEBIBYTE + 4}"]


def test_what_was_read_is_not_asked_for_again(
    proxy: FaultyProxy, bucket: str, settings: StoreSettings
) -> None:
    content = noise(6 * ROW)
    entry = put_shard(bucket, content)
    put_shard(f"{bucket}/copy", content)
    store = RemoteStore(bucket, settings)
    read_all(store, entry)
    assert len(proxy.asked) == 6
    for again in (store, RemoteStore(bucket, settings), RemoteStore(f"{bucket}/copy", settings)):
        assert read_all(again, entry) == expected_of(content, entry)
    assert len(proxy.asked) == 6


def test_data_that_was_replaced_is_not_answered_from_the_cache(
    bucket: str, settings: StoreSettings
) -> None:
    store = RemoteStore(bucket, settings)
    read_all(store, put_shard(bucket, noise(2 * ROW)))
    content = noise(2 * ROW, seed=1)
    entry = put_shard(bucket, content)
    assert read_all(store, entry) == expected_of(content, entry)


def test_whole_shards_are_fetched_once_and_checked(
    proxy: FaultyProxy, bucket: str, settings: StoreSettings
) -> None:
    content = noise(6 * ROW)
    entry = put_shard(bucket, content)
    settings = replace(settings, download="shards")
    assert read_all(RemoteStore(bucket, settings), entry) == expected_of(content, entry)
    assert read_all(RemoteStore(bucket, settings), entry) == expected_of(content, entry)
    assert proxy.asked == [f"{entry.name} 0-{len(content) - 1}"]
    other = replace(put_shard(bucket, noise(6 * ROW, seed=1)), sha256="ab" * 32)
    with pytest.raises(ShardError, match=r"s3://.*/shard-00000\.parquet: damaged, or replaced"):
        read_all(RemoteStore(bucket, settings), other)
    assert not list((tmp := settings.cache or Path()).glob("parts/*")), tmp


def test_a_shard_that_finds_no_room_is_read_by_ranges(
    proxy: FaultyProxy, bucket: str, settings: StoreSettings
) -> None:
    content = noise(6 * ROW)
    entry = put_shard(bucket, content)
    small = replace(settings, download="shards", limit_bytes=2 * ROW)
    assert read_all(RemoteStore(bucket, small), entry) == expected_of(content, entry)
    assert len(proxy.asked) == 6


def test_a_limit_of_nothing_keeps_nothing(
    proxy: FaultyProxy, bucket: str, settings: StoreSettings
) -> None:
    content = noise(3 * ROW)
    entry = put_shard(bucket, content)
    store = RemoteStore(bucket, replace(settings, limit_bytes=0))
    store.plan([(entry, row) for row in rows_of(entry)])
    for _ in range(2):
        assert read_all(store, entry) == expected_of(content, entry)
    store.close()
    assert len(proxy.asked) >= 6
    assert not list((settings.cache or Path()).glob("pieces/*/*"))


def test_an_index_is_fetched_once_checked_and_healed(
    proxy: FaultyProxy, bucket: str, settings: StoreSettings
) -> None:
    proxy.suffix = ".arrow"
    content = noise(9 * MEBIBYTE)
    put(f"{bucket}/index.arrow", content)
    sha256 = hashlib.sha256(content).hexdigest()
    entry = FileEntry(name="index.arrow", num_bytes=len(content), sha256=sha256)
    store = RemoteStore(bucket, settings)
    path = store.local_path(entry)
    assert store.local_path(entry) == path
    assert path.read_bytes() == content
    assert len(proxy.asked) == 2, "pieces of 8 MiB"
    store.close()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert RemoteStore(bucket, settings).local_path(entry).read_bytes() == content
    wrong = replace(entry, sha256="ab" * 32)
    with pytest.raises(ShardError, match=r"index\.arrow: damaged, or replaced"):
        RemoteStore(bucket, settings).local_path(wrong)


# --- faults

FAULTS = ["500", "503", "cut", "refuse", "short", "slow"]


@pytest.mark.parametrize("download", ["ranges", "shards"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_changes_nothing(
    proxy: FaultyProxy, bucket: str, settings: StoreSettings, fault: str, download: Any
) -> None:
    content = noise(3 * ROW)
    entry = put_shard(bucket, content)
    proxy.faults.extend([fault, ""] if fault == "slow" else [fault, fault, "", fault])
    store = RemoteStore(bucket, replace(settings, download=download))
    assert read_all(store, entry) == expected_of(content, entry)
    assert proxy.met[fault] >= 1


def test_a_fault_that_stays_is_named_with_address_range_tries_and_cause(
    proxy: FaultyProxy, bucket: str, settings: StoreSettings
) -> None:
    entry = put_shard(bucket, noise(ROW))
    store = RemoteStore(bucket, settings)
    for fault, cause in [("500", "We met an internal error"), ("short", "450 bytes came of 900")]:
        proxy.always = fault
        proxy.asked.clear()
        place = rf"{bucket}/shard-00000\.parquet, bytes 100-999: gave up \(after 4 tries in"
        with pytest.raises(ShardError, match=rf"{place} .* s\): {cause}"):
            store.ranges(entry, [(100, 900)])
        assert len(proxy.asked) == 4
    proxy.always = ""
    assert len(store.ranges(entry, [(100, 900)])[0]) == 900, "a failure is not remembered"


def test_what_is_missing_or_asked_wrongly_is_asked_for_once(
    proxy: FaultyProxy, bucket: str, settings: StoreSettings
) -> None:
    entry = put_shard(bucket, noise(ROW))
    store = RemoteStore(bucket, settings)
    gone = replace(entry, name="shard-00009.parquet")
    longer = replace(entry, num_bytes=9 * ROW)
    for asked, spans, message in [
        (gone, [(0, 9)], r"s3://.*/shard-00009\.parquet, bytes 0-8: missing, but the manifest"),
        (longer, [(8 * ROW, 9)], r"s3://.*, bytes 400000-400008: .*range.*not satisfiable"),
        (entry, [(ROW - 1, 2)], r"shard-00000\.parquet: bytes 49999-50000 are not in it: it has"),
    ]:
        proxy.asked.clear()
        with pytest.raises(ShardError, match=message):
            store.ranges(asked, spans)
        assert len(proxy.asked) <= 1
    with pytest.raises(ShardError, match=r"s3://.*/manifest\.json: missing"):
        store.read("manifest.json")


def test_no_access_is_asked_for_once_and_named(
    proxy: FaultyProxy, server: str, bucket: str, settings: StoreSettings
) -> None:
    import urllib.request

    def refuse_after(requests: str) -> None:
        call = urllib.request.Request(
            f"{server}/moto-api/reset-auth",
            data=requests.encode(),
            headers={"Content-Type": "text/plain"},
        )
        urllib.request.urlopen(call, timeout=10).read()

    entry = put_shard(bucket, noise(ROW))
    store = RemoteStore(bucket, settings)
    refuse_after("0")
    try:
        with pytest.raises(ShardError, match=r"s3://.* no access, check the credentials"):
            store.ranges(entry, [(0, 9)])
    finally:
        refuse_after("inf")
    assert len(proxy.asked) == 1


def test_waits_double_up_to_a_limit_and_are_shortened_by_chance() -> None:
    policy = RetryPolicy(num_tries=9, first_wait_s=1, longest_wait_s=4)
    for num_failed, longest in [(1, 1), (2, 2), (3, 4), (4, 4), (8, 4)]:
        waits = {policy.wait_s(num_failed) for _ in range(50)}
        assert len(waits) > 40
        assert longest / 2 <= min(waits) <= max(waits) <= longest


def test_a_disk_that_cannot_be_written_costs_the_cache_not_the_run(
    proxy: FaultyProxy, bucket: str, settings: StoreSettings, caplog: pytest.LogCaptureFixture
) -> None:
    content = noise(3 * ROW)
    entry = put_shard(bucket, content)
    store = RemoteStore(bucket, settings)
    store.ranges(entry, [(0, 9)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as a disk that is full
        assert read_all(store, entry) == expected_of(content, entry)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [record.message.count("cannot be written") for record in caplog.records] == [1]
    assert not list((settings.cache or Path()).glob("parts/*"))


def test_a_cache_that_cannot_be_made_is_said_with_the_remedy(
    tmp_path: Path, bucket: str, settings: StoreSettings
) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = RemoteStore(bucket, replace(settings, cache=tmp_path / "file" / "cache"))
    with pytest.raises(ShardError, match=r"s3://.*: its cache cannot be kept in .*; set PHI3V_CAC"):
        store.ranges(put_shard(bucket, noise(ROW)), [(0, 9)])


# --- the plan


def test_what_is_planned_is_there_before_it_is_read(
    proxy: FaultyProxy, bucket: str, settings: StoreSettings
) -> None:
    content = noise(20 * ROW)
    entry = put_shard(bucket, content)
    store = RemoteStore(bucket, settings)
    assert not prefetch_threads()
    store.plan((entry, row) for row in rows_of(entry))
    wait_until(lambda: len(list((settings.cache or Path()).glob("pieces/*/*"))) == 20)
    proxy.always = "500"  # nothing more is asked for
    assert read_all(store, entry) == expected_of(content, entry)
    store.close()
    assert not prefetch_threads()
    assert not list((settings.cache or Path()).glob("p[la][ar][nt]s/*"))


def test_fetching_ahead_keeps_to_its_bytes(
    proxy: FaultyProxy, bucket: str, settings: StoreSettings
) -> None:
    entry = put_shard(bucket, noise(20 * ROW))
    store = RemoteStore(bucket, replace(settings, prefetch_bytes=5 * ROW))
    rows = rows_of(entry)
    store.plan([(entry, row) for row in rows])
    wait_until(lambda: len(proxy.asked) == 5)
    time.sleep(0.2)
    assert len(proxy.asked) == 5
    for k in range(20):
        store.ranges(entry, rows[k])
        assert len(proxy.asked) <= min(20, k + 7)
    store.close()
    assert len(proxy.asked) == len(set(proxy.asked)) == 20


@pytest.mark.parametrize("download", ["ranges", "shards"])
def test_reading_along_a_plan_while_things_fail_gives_the_same_bytes(
    proxy: FaultyProxy, bucket: str, settings: StoreSettings, download: Any
) -> None:
    contents = [noise(8 * ROW, seed) for seed in range(4)]
    entries = [put_shard(bucket, content, k) for k, content in enumerate(contents)]
    proxy.faults.extend(["500", "", "cut", "", "", "short", "refuse", "", "503"] * 3)
    store = RemoteStore(bucket, replace(settings, download=download))
    plan = [(entry, row) for entry in entries for row in rows_of(entry)]
    store.plan(plan)
    for k, (entry, row) in enumerate(plan):
        content = contents[k // 8]
        assert store.ranges(entry, row) == [content[o : o + n] for o, n in row]
    store.close()
    assert sum(proxy.met.values()) >= 3


def test_a_plan_saves_requests_where_the_cache_is_small(
    proxy: FaultyProxy, bucket: str, settings: StoreSettings
) -> None:
    content = noise(8 * ROW)
    entry = put_shard(bucket, content)
    epochs = [(entry, row) for _ in range(4) for row in rows_of(entry)]
    num_asked: list[int] = []
    for is_planned in (False, True):
        folder = settings.cache or Path()
        limits = replace(settings, cache=folder / str(is_planned), limit_bytes=6 * 53_248)
        store = RemoteStore(bucket, limits)
        proxy.asked.clear()
        if is_planned:
            store.plan(epochs)
        for _, row in epochs:
            assert store.ranges(entry, row) == [content[o : o + n] for o, n in row]
        store.close()
        num_asked.append(len(proxy.asked))
    # Round and round: the longest unused is always what is needed next.
    assert num_asked[0] == 32
    assert num_asked[1] <= 24


def test_rows_that_are_skipped_or_read_out_of_order_do_not_stop_the_plan(
    settings: StoreSettings,
) -> None:
    bucket = f"memory://{uuid.uuid4().hex}"
    content = noise(300 * 1000)
    entry = put_shard(bucket, content)
    rows = [[(start, 1000)] for start in range(0, 300_000, 1000)]
    store = RemoteStore(bucket, replace(settings, prefetch_bytes=10_000))
    store.plan((entry, row) for row in rows)
    order = [k ^ 1 for k in range(300) if k % 3]
    for k in order:
        assert store.ranges(entry, rows[k]) == [content[1000 * k : 1000 * k + 1000]]
    store.plan((entry, row) for row in rows[:5])  # another one, in its place
    store.ranges(entry, rows[0])
    store.close()
    assert not prefetch_threads()


def test_a_store_that_is_forgotten_ends_its_threads(bucket: str, settings: StoreSettings) -> None:
    entry = put_shard(bucket, noise(3 * ROW))
    store = RemoteStore(bucket, settings)
    store.plan((entry, row) for row in rows_of(entry))
    assert prefetch_threads()
    del store
    wait_until(lambda: not prefetch_threads())


# --- processes


def read_in_child(store: RemoteStore, entry: ShardEntry, queue: Any) -> None:
    queue.put(read_all(store, entry))
    store.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_of_a_fork_reads_with_what_is_its_own(bucket: str, settings: StoreSettings) -> None:
    content = noise(4 * ROW)
    entry = put_shard(bucket, content)
    store = RemoteStore(bucket, settings)
    store.plan((entry, row) for row in rows_of(entry))  # threads, connections: all of this process
    store.ranges(entry, [(0, 9)])
    context: Any = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=read_in_child, args=(store, entry, queue))
    process.start()
    try:
        assert queue.get(timeout=30) == expected_of(content, entry)
        process.join(30)
        assert process.exitcode == 0
    finally:
        process.kill()
    assert read_all(store, entry) == expected_of(content, entry)
    store.close()


def test_a_store_pickles_as_its_address(bucket: str, settings: StoreSettings) -> None:
    store = RemoteStore(bucket, settings)
    entry = put_shard(bucket, noise(ROW))
    store.plan([(entry, [(0, 9)])])
    raw = pickle.dumps(store)
    assert len(raw) < 1000
    again = pickle.loads(raw)
    assert (again.name, again.settings) == (bucket, settings)
    store.close()


READ_ALL = """
import hashlib, pickle, sys
store, entry, rows, is_planned = pickle.load(sys.stdin.buffer)
if is_planned:
    store.plan((entry, row) for row in rows)
found = hashlib.sha256()
for row in rows:
    for view in store.ranges(entry, row):
        found.update(view)
print(found.hexdigest())
store.close()
"""


def start(store: RemoteStore, entry: ShardEntry, is_planned: bool) -> subprocess.Popen[bytes]:
    """A process that reads all rows, then says the hash of what it read."""
    process = subprocess.Popen(
        [sys.executable, "-c", READ_ALL],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(pickle.dumps((store, entry, rows_of(entry), is_planned)))
    process.stdin.close()
    process.stdin = None  # for `communicate`
    return process


def test_processes_that_share_a_cache_fetch_everything_once(
    proxy: FaultyProxy, bucket: str, settings: StoreSettings
) -> None:
    content = noise(30 * ROW)
    entry = put_shard(bucket, content)
    proxy.delay_s = 0.02
    store = RemoteStore(bucket, settings)
    processes = [start(store, entry, True), start(store, entry, False)]
    rows = expected_of(content, entry)
    expected = hashlib.sha256(b"".join(b"".join(row) for row in rows)).hexdigest()
    for process in processes:
        output, _ = process.communicate(timeout=60)
        assert output.decode().strip() == expected
    assert sorted(proxy.asked) == sorted(set(proxy.asked))
    assert len(proxy.asked) == 30


@pytest.mark.parametrize("download", ["ranges", "shards"])
def test_kill_9_while_reading_costs_no_more_than_what_was_on_its_way(
    proxy: FaultyProxy, bucket: str, settings: StoreSettings, download: Any
) -> None:
    content = noise(4 * ROW if download == "ranges" else 600 * ROW)
    entry = put_shard(bucket, content)
    settings = replace(settings, download=download)
    store = RemoteStore(bucket, settings)
    proxy.delay_s = 0.1
    process = start(store, entry, False)
    wait_until(lambda: len(proxy.asked) >= 3)
    process.kill()
    process.communicate(timeout=30)
    folder = settings.cache or Path()
    assert len(list(folder.glob("parts/*"))) == 1
    proxy.delay_s = 0
    num_asked = len(proxy.asked)
    assert read_all(store, entry) == expected_of(content, entry)
    assert not list(folder.glob("parts/*"))
    assert len(proxy.asked) - num_asked == (2 if download == "ranges" else 4)
    store.close()


def test_a_process_that_closes_nothing_ends_at_once(
    proxy: FaultyProxy, bucket: str, settings: StoreSettings
) -> None:
    content = noise(20 * ROW)
    entry = put_shard(bucket, content)
    proxy.always = "slow"  # its threads are waiting when it ends
    code = """
import pickle, sys
store, entry = pickle.load(sys.stdin.buffer)
store.plan([(entry, [(50_000 * k, 100)]) for k in range(20)])
print(store)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        input=pickle.dumps((RemoteStore(bucket, settings), entry)),
        capture_output=True,
        timeout=20,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode().strip() == f"RemoteStore({bucket!r})"
    proxy.always = ""
    assert read_all(RemoteStore(bucket, settings), entry) == expected_of(content, entry)
    assert not [p for p in (settings.cache or Path()).glob("p*/*") if p.parent.name != "pieces"]


# --- a reader on top


@pytest.fixture(scope="module")
def local_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("local")
    samples: list[Sample] = []
    for i in range(12):
        names = tuple(f"{i}.{k}.png" for k in range(i % 4))
        for k, name in enumerate(names):
            (tmp_path / "images").mkdir(exist_ok=True)
            size = (40 + i, 30 + k)
            pixels = noise(3 * size[0] * size[1], seed=10 * i + k)
            Image.frombytes("RGB", size, pixels).save(tmp_path / "images" / name)
        turn = Turn(images=names, user=f"What is it? {i}", assistant="noise")
        samples.append(Sample(id=f"s{i}", source="toy", conversations=(turn,)))
    write_samples(tmp_path / "train.jsonl", samples)
    file = tmp_path / "train.jsonl"
    write_shards([file], tmp_path / "shards", shard_bytes=12_000, num_workers=1)
    return tmp_path / "shards"


@pytest.fixture
def remote_shards(bucket: str, local_shards: Path) -> str:
    for path in local_shards.iterdir():
        put(f"{bucket}/{path.name}", path.read_bytes())
    return bucket


@pytest.mark.parametrize("download", ["ranges", "shards"])
@pytest.mark.parametrize("is_planned", [False, True])
def test_the_samples_of_an_address_are_those_of_the_folder(
    proxy: FaultyProxy,
    remote_shards: str,
    local_shards: Path,
    settings: StoreSettings,
    is_planned: bool,
    download: Any,
) -> None:
    proxy.faults.extend(["500", "cut", "", "short", "refuse"])
    store = RemoteStore(remote_shards, replace(settings, download=download))
    here, there = open_shards(local_shards), open_shards(store)
    assert (len(there), there.fingerprint) == (len(here), here.fingerprint)
    order = [(5 * k) % 12 for k in range(12)]
    if is_planned:
        store.plan(map(there.image_spans, order))
    for i in order:
        assert there[i].sample == here[i].sample
        assert there[i].images == here[i].images
    assert sum(proxy.met.values()) == 4
    again = pickle.loads(pickle.dumps(there))
    assert again[3].images == here[3].images
    there.close()
    again.close()


def test_bytes_that_changed_on_their_way_are_fetched_once_more(
    proxy: FaultyProxy, remote_shards: str, local_shards: Path, settings: StoreSettings
) -> None:
    here, there = open_shards(local_shards), open_shards(RemoteStore(remote_shards, settings))
    proxy.faults.extend(["flip"])
    assert there[3].images == here[3].images
    assert len(proxy.asked) == 2
    proxy.faults.extend(["flip", "flip"])
    with pytest.raises(ShardError, match=r"s3://.*: row 2, sample 's2', image .* are damaged"):
        _ = there[2]


def test_an_address_opens_as_a_remote_store(bucket: str, local_shards: Path) -> None:
    store = open_store(bucket)
    assert isinstance(store, RemoteStore)
    assert store.name == bucket
    manifest = read_manifest(local_shards)
    put(f"{bucket}/manifest.json", (local_shards / "manifest.json").read_bytes())
    assert store.read("manifest.json") == manifest.to_json().encode()
    with pytest.raises(ValueError, match="expected 'ranges' or 'shards', got 'both'"):
        RemoteStore(bucket, StoreSettings(download="both"))  # pyright: ignore[reportArgumentType]


def test_the_benchmark_counts_requests_and_compares_what_was_read(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "remote_shards.py"
    options = ["--rows", "6", "--rounds", "1", "--latency", "1", "--decode", "0"]
    command = [sys.executable, str(script), *options, "--json", str(tmp_path / "result.json")]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    result = json.loads((tmp_path / "result.json").read_text())
    requests = result["requests"]
    assert (requests["each image"], requests["coalesced"], requests["planned"]) == (30, 6, 6)
    assert (requests["cached"], requests["whole shards"], requests["local"]) == (0, 0, 0)
    assert result["ms_a_row"]["each image"] > result["ms_a_row"]["local"]
