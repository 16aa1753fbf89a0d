"""Run a converter: in parallel, resumable, atomic, the same bytes every time.

    result = convert(Ucf101(), "UCF101_subset", "converted")
    result.counts                  # {"train": 300, "val": 30, "test": 75}
    result.rejected                # {"truncated": 1}

What comes out:

    converted/
        images/…                   # written by the converter
        ucf101_train.jsonl …       # one file a split, samples in the order of the items
        rejected.jsonl             # where something was rejected: item, index, reason, detail
        manifest.json              # converter, settings, counts, SHA-256 of the files above

The steps: list all items; give them to processes; write down each finished one in a journal,
`converted/.convert/journal.jsonl`; when all are there, write the files from the journal, the
manifest last, and remove the journal. So a run that was interrupted, killed with -9 included,
continues where it stopped and converts no finished item again, and the output depends neither on
the number of processes nor on interruptions. A run on another source, or with other settings, is
refused and says what differs.

An archive (`.tar`, `.tar.gz`, …) is unpacked beside the journal first; the converter sees a folder.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import tarfile
import threading
import traceback
import zlib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import wait as wait_for_sentinel
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import Any, BinaryIO

from phi3v_data.atomic import open_atomic, write_atomic
from phi3v_data.converters import Converter, Item, Rejected
from phi3v_data.schema import Sample

MANIFEST = "manifest.json"
REJECTED = "rejected.jsonl"
WORK = ".convert"
FORMAT = "phi3v-data conversion 1"

_ARCHIVE = re.compile(r"\.(tar|tgz|tbz2?|txz|tar\.(gz|bz2|xz))$", re.IGNORECASE)
_SPLIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

# The machine's trouble, not the item's: the run stops instead of rejecting everything after it.
_FATAL_ERRNOS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
)


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion gave."""

    out_dir: Path

    files: dict[str, Path]
    """Split → its JSONL file."""

    counts: dict[str, int]
    """Split → samples in its file."""

    rejected: dict[str, int]
    """Reason → how many, most frequent first."""

    rejected_file: Path | None
    """The list of what was rejected; None where nothing was."""

    num_items: int
    """Items the source holds (with a limit: that were asked for)."""

    num_reused: int
    """Of these, finished by an earlier run."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C arrived; what is finished is kept, and the same call continues."""

    def __init__(self, num_done: int, num_items: int) -> None:
        super().__init__(
            f"interrupted: {num_done} of {num_items} items done; "
            "run the same command again to continue"
        )
        self.num_done = num_done
        self.num_items = num_items


def convert(
    converter: Converter,
    source: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    num_workers: int | None = None,
    overwrite: bool = False,
    limit: int | None = None,
    progress: bool = False,
) -> ConversionResult:
    """Convert a raw data set to images and conversations JSONL; continue where a run stopped.

    Args:
        converter: knows the format of the source; see `phi3v_data.converters`.
        source: a folder, a file, or an archive that is unpacked first.
        out_dir: where the output goes; made if need be.
        num_workers: processes; None takes one per core, 0 converts in this process. A script that
            uses processes needs `if __name__ == "__main__":` around the call.
        overwrite: remove what an earlier conversion left in `out_dir` and start anew.
        limit: convert the first `limit` items only.
        progress: draw a progress bar on stderr.

    Raises:
        ValueError: the source is missing or not as the converter expects it, or `out_dir` holds
            something else. Nothing is written then.
        Interrupted: Ctrl-C.
    """
    source_path, out_path = Path(source), Path(out_dir)
    workers = _num_cores() if num_workers is None else num_workers
    if workers < 0 or (limit is not None and limit < 1):
        raise ValueError(f"expected num_workers >= 0 and limit >= 1, got {workers} and {limit}")
    if not source_path.exists():
        raise ValueError(f"source not found: {source}; expected a folder or an archive (.tar.gz)")
    if out_path.exists() and not out_path.is_dir():
        raise ValueError(f"out_dir is a file: {out_dir}; name a folder")
    if workers:
        _check_picklable(converter)
    _check_not_foreign(out_path, converter.name)

    is_archive = source_path.is_file() and bool(_ARCHIVE.search(source_path.name))
    identity = {
        "format": FORMAT,
        "phi3v_data": version("phi3v-data"),
        "converter": converter.name,
        "settings": _settings(converter),
        "limit": limit,
        "source": _hash_file(source_path) if is_archive else None,
    }
    if is_archive and not overwrite:  # a finished one need not be unpacked to be known
        finished = _read_finished(out_path, identity, None)
        if finished is not None:
            return finished
    items = [] if is_archive else _discover(converter, source_path, limit)

    with _work_folder(out_path) as work:
        if is_archive:
            items = _discover(converter, _unpack(source_path, work / "source"), limit)
        identity["listing"] = _hash_listing(items)
        identity["num_items"] = len(items)
        if overwrite or _is_barren(work / "journal.jsonl"):
            _remove_output(out_path, work)
        finished = _read_finished(out_path, identity, items)
        if finished is not None:
            return finished
        with _Journal(work / "journal.jsonl", identity, out_path) as journal:
            num_reused = len(journal.offsets)
            todo = [item for item in items if item.index not in journal.offsets]
            rejected = sum(bool(journal.read(index).rejected) for index in journal.offsets)
            try:
                with _progress_bar(progress, converter.name, len(items), num_reused) as advance:
                    advance(0, rejected)
                    with contextlib.closing(
                        _run(converter, todo, out_path.absolute(), workers)
                    ) as outcomes:
                        for outcome in outcomes:
                            journal.append(outcome)
                            rejected += bool(outcome.rejected)
                            advance(1, rejected)
                result = _write_output(converter.name, items, journal, out_path, identity)
            except KeyboardInterrupt:
                raise Interrupted(len(journal.offsets), len(items)) from None
            journal.path.unlink()  # the manifest stands: the work folder may go
        return dataclasses.replace(result, num_reused=num_reused)


# --- what there is to do -------------------------------------------------------------------------


def _discover(converter: Converter, source: Path, limit: int | None) -> list[Item]:
    items: list[Item] = []
    for item in converter.discover(source):
        if limit is not None and len(items) >= limit:
            break
        if not _SPLIT.fullmatch(item.split):
            raise ValueError(f"item {item.key!r}: {item.split!r} is no name for a split's file")
        items.append(item)
    if not items:
        raise ValueError(f"nothing to convert: {converter.name} found no item in {source}")
    for what, values in (("index", [i.index for i in items]), ("key", [i.key for i in items])):
        value, count = Counter[int | str](values).most_common(1)[0]
        if count > 1:
            raise ValueError(f"converter {converter.name}: {count} items have the {what} {value!r}")
    return sorted(items, key=lambda item: item.index)


def _check_picklable(converter: Converter) -> None:
    try:
        pickle.dumps(converter)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"converter {converter.name} cannot go to worker processes ({error}); define its class "
            "at the top of a module, or use num_workers=0"
        ) from error


def _hash_listing(items: Iterable[Item]) -> str:
    """Keys, order and file sizes; not times, which copying changes."""
    digest = hashlib.sha256()
    for item in items:
        try:
            size = os.stat(item.path).st_size
        except OSError:
            size = -1
        digest.update(json.dumps([item.index, item.key, item.split, size]).encode())
    return digest.hexdigest()


def _settings(converter: Converter) -> dict[str, Any]:
    """The converter's public attributes as JSON data."""
    if dataclasses.is_dataclass(converter):
        found = dataclasses.asdict(converter)
    else:
        found = {k: v for k, v in vars(converter).items() if not k.startswith("_")}
    return json.loads(json.dumps(found, default=repr, sort_keys=True))


def _unpack(archive: Path, folder: Path) -> Path:
    """Unpack regular files under `folder`, whole or not at all; return it.

    Names, not modes, owners or times. One member that is a link or a device, or would land outside,
    and the archive is refused: no data set needs it, and half of one is worth nothing.
    """
    if folder.exists():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with tarfile.open(archive, "r|*") as tar:
            for member in tar:
                _unpack_member(tar, member, partial)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno in _FATAL_ERRNOS:
            raise
        raise ValueError(f"{archive.name} is damaged or no tar archive: {error}") from error
    partial.rename(folder)
    return folder


def _unpack_member(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\0" in member.name:
        raise ValueError(f"refused archive: its member {member.name!r} would land outside")
    if member.isdir():
        (folder / name).mkdir(parents=True, exist_ok=True)
        return
    if not member.isreg():
        raise ValueError(f"refused archive: its member {member.name!r} is a link or a device")
    data = tar.extractfile(member)
    assert data is not None, "a regular member has contents"
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with data, open(folder / name, "wb") as file:
        shutil.copyfileobj(data, file, 1 << 20)


# --- the output folder ---------------------------------------------------------------------------


@contextlib.contextmanager
def _work_folder(out_dir: Path) -> Generator[Path, None, None]:
    """Hold `out_dir/.convert` for this run alone; it stays as long as a journal is in it."""
    is_new = not out_dir.exists()
    work = out_dir / WORK
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another conversion is writing to {out_dir}; wait for it") from None
        try:
            yield work
        finally:
            if not (work / "journal.jsonl").exists():
                shutil.rmtree(work)
                if is_new and not any(out_dir.iterdir()):
                    out_dir.rmdir()


def _check_not_foreign(out_dir: Path, name: str) -> None:
    """Refuse a folder whose images or samples are not ours: they would be mixed, or lost."""
    if (out_dir / MANIFEST).exists() or (out_dir / WORK / "journal.jsonl").exists():
        return
    for path in (out_dir / "images", *sorted(out_dir.glob(f"{name}_*.jsonl"))):
        if path.exists():
            raise ValueError(
                f"{out_dir} holds {path.name} of other origin; choose an empty --out_dir"
            )


def _remove_output(out_dir: Path, work: Path) -> None:
    """Remove what a conversion writes, the marks that it is ours last."""
    shutil.rmtree(out_dir / "images", ignore_errors=True)
    manifest = _read_manifest(out_dir)
    for name in [*manifest.get("files", {}), REJECTED, MANIFEST]:
        (out_dir / Path(name).name).unlink(missing_ok=True)
    (work / "journal.jsonl").unlink(missing_ok=True)


def _read_manifest(out_dir: Path) -> dict[str, Any]:
    path = out_dir / MANIFEST
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or "run" not in manifest:
        raise ValueError(f"{path} is not a conversion's manifest; choose an empty --out_dir")
    return manifest  # pyright: ignore[reportUnknownVariableType]


def _read_finished(
    out_dir: Path, identity: dict[str, Any], items: Sequence[Item] | None
) -> ConversionResult | None:
    """The result of a finished run of this identity; None where none is there."""
    manifest = _read_manifest(out_dir)
    if not manifest:
        return None
    _check_same_run(manifest["run"], identity, out_dir, partial=items is None)
    for name, facts in manifest["files"].items():
        path = out_dir / name
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            raise ValueError(
                f"{path} is gone or has changed since it was written; --overwrite converts anew"
            )
    return _result(out_dir, manifest, manifest["run"]["num_items"])


def _check_same_run(
    then: dict[str, Any], now: dict[str, Any], out_dir: Path, *, partial: bool = False
) -> None:
    """Refuse to continue another run; the message names every difference."""
    flat_then, flat_now = _flatten(then), _flatten(now)
    keys = [key for key in flat_then | flat_now if key in flat_now or not partial]
    differences = [
        f"{key} was {flat_then.get(key)!r}, now {flat_now.get(key)!r}"
        for key in keys
        if flat_then.get(key) != flat_now.get(key) and key not in ("listing", "source", "num_items")
    ]
    if any(key in keys and then.get(key) != now.get(key) for key in ("listing", "source")):
        num_then, num_now = then.get("num_items"), now.get("num_items")
        numbers = f"{num_then} items then, {num_now} now" if num_now not in (None, num_then) else ""
        differences.append(f"the source is another ({numbers or 'names or sizes differ'})")
    if differences:
        raise ValueError(
            f"{out_dir} holds another conversion: {'; '.join(differences)}. "
            "Use the same settings to continue it, another --out_dir, or --overwrite to start anew"
        )


def _flatten(identity: dict[str, Any]) -> dict[str, Any]:
    settings = {f"setting {k}": v for k, v in identity.get("settings", {}).items()}
    return {k: v for k, v in identity.items() if k != "settings"} | settings


def _write_output(
    name: str, items: Sequence[Item], journal: "_Journal", out_dir: Path, identity: dict[str, Any]
) -> ConversionResult:
    """Write the JSONL files from the journal, in the order of items, and the manifest last."""
    splits = list(dict.fromkeys(item.split for item in items))
    counts = dict.fromkeys(splits, 0)
    reasons: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        files = {
            split: stack.enter_context(open_atomic(out_dir / f"{name}_{split}.jsonl"))
            for split in splits
        }
        rejected_file = None
        for item in items:
            outcome = journal.read(item.index)
            for line in outcome.samples:
                files[item.split].write(line.encode() + b"\n")
            counts[item.split] += len(outcome.samples)
            for reason, detail in outcome.rejected:
                if rejected_file is None:
                    rejected_file = stack.enter_context(open_atomic(out_dir / REJECTED))
                entry = {"item": item.key, "index": item.index, "reason": reason, "detail": detail}
                rejected_file.write(json.dumps(entry).encode() + b"\n")
                reasons[reason] += 1
    names = {split: f"{name}_{split}.jsonl" for split in splits}
    written = [*names.values(), *([REJECTED] if reasons else [])]
    manifest = {
        "run": identity,
        "splits": names,
        "counts": counts,
        "rejected": dict(sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))),
        "files": {
            file: {"bytes": (out_dir / file).stat().st_size, "sha256": _hash_file(out_dir / file)}
            for file in written
        },
    }
    write_atomic(out_dir / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return _result(out_dir, manifest, 0)


def _result(out_dir: Path, manifest: dict[str, Any], num_reused: int) -> ConversionResult:
    return ConversionResult(
        out_dir=out_dir,
        files={split: out_dir / file for split, file in manifest["splits"].items()},
        counts=manifest["counts"],
        rejected=manifest["rejected"],
        rejected_file=out_dir / REJECTED if manifest["rejected"] else None,
        num_items=manifest["run"]["num_items"],
        num_reused=num_reused,
    )


def _hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- the journal ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outcome:
    """What one item gave: samples as JSONL lines, rejections as (reason, detail)."""

    index: int
    samples: tuple[str, ...]
    rejected: tuple[tuple[str, str], ...]


class _Journal:
    """Finished items, one line each after a line that says which run it is; appended only.

    A line counts when its line break is there: a kill in the middle of a write leaves a torn last
    line, which is cut off. So are lines of items whose images are gone or empty (a power cut).
    """

    def __init__(self, path: Path, identity: dict[str, Any], out_dir: Path) -> None:
        self.path = path
        self.offsets: dict[int, int] = {}
        """Item index → where its line starts."""
        header = json.dumps(identity).encode() + b"\n"
        self._file: BinaryIO = open(path, "a+b", buffering=0)
        try:
            self._load(header, identity, out_dir)
        except BaseException:
            self._file.close()
            raise

    def _load(self, header: bytes, identity: dict[str, Any], out_dir: Path) -> None:
        self._end = 0
        with open(self.path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                except ValueError:
                    break
                if self._end == 0:
                    _check_same_run(entry, identity, out_dir)
                elif _images_are_there(entry["samples"], out_dir):
                    self.offsets[entry["index"]] = self._end
                self._end += len(line)
        self._file.truncate(self._end)
        if self._end == 0:
            self._file.write(header)
            self._end = len(header)

    def append(self, outcome: _Outcome) -> None:
        line = json.dumps(dataclasses.asdict(outcome)).encode() + b"\n"
        written = self._file.write(line)
        if written != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self.offsets[outcome.index] = self._end
        self._end += written

    def read(self, index: int) -> _Outcome:
        self._file.seek(self.offsets[index])
        with open(os.dup(self._file.fileno()), "rb") as file:
            entry = json.loads(file.readline())
        rejected = tuple((reason, detail) for reason, detail in entry["rejected"])
        return _Outcome(entry["index"], tuple(entry["samples"]), rejected)

    def __enter__(self) -> "_Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _is_barren(path: Path) -> bool:
    """Whether a journal holds no finished item: nothing is lost by starting anew."""
    if not path.exists():
        return False
    with open(path, "rb") as file:
        return sum(1 for _ in zip(file, range(2), strict=False)) < 2


def _images_are_there(lines: Iterable[str], out_dir: Path) -> bool:
    for line in lines:
        for turn in json.loads(line)["conversations"]:
            for name in turn["images"]:
                try:
                    if os.stat(out_dir / "images" / name).st_size == 0:
                        return False
                except OSError:
                    return False
    return True


# --- the processes -------------------------------------------------------------------------------


def _convert_item(converter: Converter, item: Item, out_dir: Path) -> _Outcome:
    """Convert one item; an exception of the converter rejects the item and is named."""
    samples: list[str] = []
    rejected: list[tuple[str, str]] = []
    try:
        for result in converter.convert(item, out_dir):
            if isinstance(result, Rejected):
                rejected.append((result.reason, result.detail))
            elif isinstance(result, Sample):  # pyright: ignore[reportUnnecessaryIsInstance]
                samples.append(result.to_json())
            else:
                raise TypeError(f"convert must yield Sample or Rejected, got {result!r}")
    except Exception as error:
        if isinstance(error, MemoryError) or (
            isinstance(error, OSError) and error.errno in _FATAL_ERRNOS
        ):
            raise
        samples.clear()
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        message = " ".join(str(error).split())
        rejected.append(("converter_error", f"{type(error).__name__} at {where}: {message}"))
    if not samples and not rejected:
        rejected.append(("no_sample", "the converter gave nothing for it"))
    return _Outcome(item.index, tuple(samples), tuple(rejected))


def _run(
    converter: Converter, items: Sequence[Item], out_dir: Path, num_workers: int
) -> Generator[_Outcome, None, None]:
    """Yield the outcomes as they come, in any order."""
    if num_workers == 0:
        for item in items:
            yield _convert_item(converter, item, out_dir)
        return
    waiting = deque(items)
    while waiting:
        lost: list[Item] = []
        yield from _run_pool(converter, waiting, out_dir, min(num_workers, len(waiting)), lost)
        # A process died and took the pool along. One of these killed it: one by one, it shows.
        suspects = deque(lost)
        while suspects:
            culprits: list[Item] = []
            yield from _run_pool(converter, suspects, out_dir, 1, culprits, window=1)
            for item in culprits:
                detail = "the process that converted it died (a crash of the decoder, or memory)"
                yield _Outcome(item.index, (), (("worker_died", detail),))


def _run_pool(
    converter: Converter,
    waiting: deque[Item],
    out_dir: Path,
    num_workers: int,
    lost: list[Item],
    window: int = 4,
) -> Iterator[_Outcome]:
    """Work off `waiting` in one pool; if it breaks, put the items under way into `lost`.

    At most `window` items a worker are under way: enough to keep all busy, few to hold or lose.
    """
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        num_workers,
        # Neither this process's threads nor its memory: a fork of a process with threads may hang.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(converter, out_dir),
    )
    running: dict[Future[_Outcome], Item] = {}
    is_done = False
    try:
        _start_workers(pool, num_workers)
        while waiting or running:
            while waiting and len(running) < window * num_workers:
                running[pool.submit(_work, waiting[0])] = waiting[0]
                waiting.popleft()
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                outcome = future.result()
                del running[future]
                yield outcome
        is_done = True
    except BrokenProcessPool:
        yield from _collect(running)
        lost.extend(running.values())
    except KeyboardInterrupt:
        yield from _collect(running)
        raise
    finally:
        if not is_done:  # what is half done is not waited for: its images have no final names
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
        pool.shutdown(cancel_futures=True)


def _collect(running: dict[Future[_Outcome], Item]) -> Iterator[_Outcome]:
    """Take out of `running` what is finished."""
    for future in list(running):
        if future.done() and not future.cancelled() and future.exception() is None:
            del running[future]
            yield future.result()


def _start_workers(pool: ProcessPoolExecutor, num_workers: int) -> None:
    """Start all processes, deaf to Ctrl-C: it goes to the whole group, and this one answers."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler: Callable[[int, FrameType | None], Any] | int | None = None
    if in_main_thread:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by what is started now
    try:
        ready = [pool.submit(_nothing) for _ in range(num_workers)]
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)
    try:
        for future in ready:
            future.result()
    except BrokenProcessPool:
        raise ValueError(
            "the worker processes cannot start; see their error above. A script that converts "
            'needs `if __name__ == "__main__":` around the call, or num_workers=0'
        ) from None


def _nothing() -> None:
    """What a started worker does first."""


_WORKER: list[tuple[Converter, Path]] = []
"""In a worker: the converter and the output folder; empty elsewhere."""


def _start_worker(converter: Converter, out_dir: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _WORKER.append((converter, out_dir))


def _die_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for_sentinel([parent.sentinel])
    os._exit(1)


def _work(item: Item) -> _Outcome:
    converter, out_dir = _WORKER[0]
    return _convert_item(converter, item, out_dir)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _progress_bar(
    enabled: bool, name: str, num_items: int, num_done: int
) -> Generator[Callable[[int, int], None], None, None]:
    """Yield `advance(items, rejected so far)`."""
    if not enabled:
        yield lambda items, rejected: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("[red]{task.fields[rejected]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(
            f"convert {name}", total=num_items, completed=num_done, rate="", rejected=""
        )

        def advance(items: int, rejected: int) -> None:
            bar.advance(task, items)
            speed = bar.tasks[0].finished_speed or bar.tasks[0].speed
            bar.update(
                task,
                rate=f"{speed:.1f}/s" if speed else "",
                rejected=f"{rejected} rejected" if rejected else "",
            )

        yield advance
