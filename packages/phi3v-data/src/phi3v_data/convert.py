"""Run a converter: in parallel, resumable, atomic, the same bytes every time.

    result = convert(Ucf101(), "UCF101_subset", "converted")
    result.counts                  # {"train": 300, "val": 30, "test": 75}
    result.rejected                # {"truncated": 1}

What comes out:

    converted/
        images/…                   # written by the converter
        ucf101_train.jsonl …       # one file a split, samples in the order of the items
        rejected.jsonl             # where something was rejected: item, index, reason, detail
        dataset_card.md            # what this is, for people
        manifest.json              # converter, settings, counts, SHA-256 of the files above

The steps: list all items; have an engine convert them; write down each finished one in a journal,
`converted/.convert/journal.jsonl`; when all are there, write the files from the journal, the
manifest last, and remove the journal. So a run that was interrupted, killed with -9 included,
continues where it stopped and converts no finished item again, and the output depends neither on
the engine, nor on the number of processes, nor on interruptions. A run on another source, or with
other settings, is refused and says what differs.

An archive (`.tar`, `.tar.gz`, …) is unpacked beside the journal first, and what is at an address
(`s3://…`) copied there; the converter sees a folder.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import re
import shutil
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from phi3v_data.addresses import is_address
from phi3v_data.conversion.dataset_card import CARD, CardFacts, render_card
from phi3v_data.conversion.item_task import CONVERTER_ERROR, WORKER_DIED, ItemTask, Outcome
from phi3v_data.conversion.journal import Journal, is_barren
from phi3v_data.conversion.local_engine import run_local
from phi3v_data.conversion.outputs import IMAGES, JOURNAL, HashedFile, Output, open_output
from phi3v_data.conversion.progress import conversion_progress
from phi3v_data.conversion.source_copy import SourceCopy, fingerprint, is_archive
from phi3v_data.converters import Converter, Item
from phi3v_data.converters.function_converter import AnyConverter, as_converter
from phi3v_data.worker_pool import num_cores

MANIFEST = "manifest.json"
REJECTED = "rejected.jsonl"
FETCHED = "fetched-"
FORMAT = "phi3v-data conversion 2"

Engine = Literal["local", "ray"]
OnError = Literal["reject", "stop"]

_SPLIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class Fault:
    """The converter raised; the rest of the run did not suffer."""

    item: str
    """Key of the first item that it raised for, at this place."""

    detail: str
    """Type, place and message."""

    traceback: tuple[str, ...]
    """`file:line, in function: source`, outermost first."""


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion gave."""

    out_dir: Any
    """A `Path`; the address, where the output is at one. So are the files below."""

    files: dict[str, Any]
    """Split → its JSONL file."""

    counts: dict[str, int]
    """Split → samples in its file."""

    rejected: dict[str, int]
    """Reason → how many, most frequent first."""

    rejected_file: Any
    """The list of what was rejected; None where nothing was."""

    num_items: int
    """Items of the source; with a limit, those that were needed."""

    num_reused: int
    """Of these, finished by an earlier run."""

    faults: tuple[Fault, ...] = ()
    """One for each place where the converter raised."""


class ConverterError(RuntimeError):
    """The converter raised, and `on_error="stop"`; what is finished is kept."""

    def __init__(self, fault: Fault) -> None:
        lines = "\n  ".join(fault.traceback)
        super().__init__(f"{fault.item}: {fault.detail}\n  {lines}")
        self.fault = fault


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
    converter: AnyConverter,
    source: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    splits: Sequence[str] | None = None,
    limit: int | None = None,
    on_error: OnError = "reject",
    num_workers: int | None = None,
    engine: Engine = "local",
    ray_address: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> ConversionResult:
    """Convert a raw data set to images and conversations JSONL; continue where a run stopped.

    Args:
        converter: knows the format of the source: an object, or a function of a file; see
            `phi3v_data.converters`.
        source: a folder, a file, or an archive that is unpacked first; or an address of one
            (`s3://bucket/folder`), which is copied first.
        out_dir: where the output goes, a folder or an address; made if need be.
        splits: only these; None: all.
        limit: the first `limit` samples only, in the order of the output.
        on_error: what an exception of the converter does: reject its item, or stop the run.
        num_workers: processes; None takes one per core (of the cluster, with Ray), 0 converts in
            this process. A script that uses processes needs `if __name__ == "__main__":` around
            the call.
        engine: processes of this machine, or tasks of Ray (`pip install 'phi3v-data[ray]'`).
        ray_address: the cluster; None: that of `RAY_ADDRESS`, or else a Ray of its own.
        overwrite: remove what an earlier conversion left in `out_dir` and start anew.
        progress: draw a progress bar on stderr.

    Raises:
        ValueError: the source is missing or not as the converter expects it, or `out_dir` holds
            something else. Nothing is written then.
        ConverterError: the converter raised, and that stops the run.
        Interrupted: Ctrl-C.
    """
    converter = as_converter(converter)
    output = open_output(out_dir)
    workers = _num_workers(num_workers, engine, output)
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1, got {limit}")
    if not is_address(source) and not Path(source).exists():
        raise ValueError(f"source not found: {source}; expected a folder or an archive (.tar.gz)")
    if workers:
        _check_picklable(converter)
    _check_not_foreign(output, converter.name)

    is_copied = is_address(source) or is_archive(source)
    identity: dict[str, Any] = {
        "format": FORMAT,
        "phi3v_data": version("phi3v-data"),
        "converter": converter.name,
        "settings": _settings(converter),
        "splits": None if splits is None else sorted(set(splits)),
        "limit": limit,
        "source": fingerprint(source) if is_copied else None,
    }
    if is_copied and not overwrite:  # a finished one need not be brought here to be known
        finished = _read_finished(output, identity, is_listed=False)
        if finished is not None:
            if output.work.exists() or output.is_begun():  # killed after its last file
                with _work_folder(output) as work:
                    _remove_journal(output, work)
            return finished
    items = [] if is_copied else list_items(converter, Path(source), splits)

    with _work_folder(output) as work:
        output.restore(work / JOURNAL)
        copy = None
        if is_copied:
            kind = FETCHED if is_address(source) else "unpacked-"
            folder = work.absolute() / f"{kind}{identity['source'][:16]}"
            copy = SourceCopy(os.fspath(source), str(folder))
            with conversion_progress(progress, f"fetch {Path(source).name}", "files") as show:
                root = copy.ensure(lambda done, total: show(done, total, 0))
            items = list_items(converter, root, splits)
        identity["listing"] = _hash_listing(items)
        identity["num_items"] = len(items)
        if overwrite or is_barren(work / JOURNAL):
            _remove_output(output, work)
        finished = _read_finished(output, identity, is_listed=True)
        if finished is not None:
            _remove_journal(output, work)
            return finished
        with Journal(
            work / JOURNAL,
            identity,
            output,
            lambda then: _check_same_run(then, identity, output),
        ) as journal:
            num_reused = len(journal.offsets)
            task = ItemTask(converter, _absolute(output), limit, copy)
            try:
                used = _run(task, items, journal, engine, workers, ray_address, on_error, progress)
                result = _write_output(converter, used, journal, output, identity)
            except KeyboardInterrupt:
                raise Interrupted(len(journal.offsets), len(items)) from None
            journal.remove()  # the manifest stands: the work folder may go
        return dataclasses.replace(result, num_reused=num_reused)


# --- what there is to do -------------------------------------------------------------------------


def list_items(
    converter: Converter, source: Path, splits: Sequence[str] | None = None
) -> list[Item]:
    """The items of a source in output order; only of some splits, where those are named.

    Raises:
        ValueError: there is none, or the converter names two alike.
    """
    items: list[Item] = []
    for item in converter.discover(source):
        if not _SPLIT.fullmatch(item.split):
            raise ValueError(f"item {item.key!r}: {item.split!r} is no name for a split's file")
        items.append(item)
    if not items:
        raise ValueError(f"nothing to convert: {converter.name} found no item in {source}")
    for what, values in (("index", [i.index for i in items]), ("key", [i.key for i in items])):
        value, count = Counter[int | str](values).most_common(1)[0]
        if count > 1:
            raise ValueError(f"converter {converter.name}: {count} items have the {what} {value!r}")
    items.sort(key=lambda item: item.index)
    if splits is None:
        return items
    known = dict.fromkeys(item.split for item in items)
    for split in splits:
        if split not in known:
            raise ValueError(f"no split named {split!r} in {source}: it has {', '.join(known)}")
    return [item for item in items if item.split in splits]


def _num_workers(num_workers: int | None, engine: Engine, output: Output) -> int:
    if engine not in ("local", "ray"):
        raise ValueError(f"engine: expected local or ray, got {engine!r}")
    if num_workers is None:
        num_workers = num_cores() if output.takes_processes else 0
    if num_workers < 0:
        raise ValueError(f"num_workers: expected at least 0, got {num_workers}")
    if not output.takes_processes and (num_workers or engine == "ray"):
        raise ValueError(
            f"{output} is seen by this process only; choose another address, or num_workers=0"
        )
    if num_workers == 0 and engine == "ray":
        raise ValueError("num_workers: expected at least 1 with Ray, got 0")
    return num_workers


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
        names = [field.name for field in dataclasses.fields(converter)]
        found = {name: getattr(converter, name) for name in names}
    else:
        found = {k: v for k, v in vars(converter).items() if not k.startswith("_")}
    return json.loads(json.dumps(found, default=_describe, sort_keys=True))


def _describe(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if callable(value) and hasattr(value, "__qualname__"):  # its repr holds an address
        return f"{value.__module__}:{value.__qualname__}"
    return repr(value)


# --- doing it ------------------------------------------------------------------------------------


def _run(
    task: ItemTask,
    items: Sequence[Item],
    journal: Journal,
    engine: Engine,
    num_workers: int,
    ray_address: str | None,
    on_error: OnError,
    progress: bool,
) -> Sequence[Item]:
    """Convert what the journal lacks; return the items that the output needs."""
    quota = _Quota(items, task.limit)
    quota.advance(journal.num_samples)
    todo = [item for item in items if item.index not in journal.offsets]
    waiting = _while_needed(todo, quota)
    if engine == "ray":
        from phi3v_data.conversion.ray_engine import run_ray

        outcomes = run_ray(task, waiting, min(num_workers, len(todo)), ray_address)
    else:
        outcomes = run_local(task, waiting, min(num_workers, len(todo)))
    keys = {item.index: item.key for item in todo}
    unit = "items" if task.limit is None else "samples"
    with (
        conversion_progress(progress, f"convert {task.converter.name}", unit) as show,
        contextlib.closing(outcomes),
    ):
        show(*quota.progress(journal), journal.num_rejected)
        for outcome in outcomes:
            if on_error == "stop":
                for fault in _faults(outcome, keys[outcome.index]):
                    raise ConverterError(fault)
            journal.append(outcome)
            quota.advance(journal.num_samples)
            show(*quota.progress(journal), journal.num_rejected)
    return quota.used


class _Quota:
    """Whether the items that are done, none before them missing, give samples enough."""

    def __init__(self, items: Sequence[Item], limit: int | None) -> None:
        self._items = items
        self._limit = limit
        self._num_samples = 0
        self._position = 0

    def advance(self, num_samples: dict[int, int]) -> None:
        """Look at what is done: item index → samples."""
        while not self.is_met and self._position < len(self._items):
            index = self._items[self._position].index
            if index not in num_samples:
                break
            self._num_samples += num_samples[index]
            self._position += 1

    @property
    def is_met(self) -> bool:
        """Whether no further item is needed."""
        return self._limit is not None and self._num_samples >= self._limit

    @property
    def used(self) -> Sequence[Item]:
        """The items that gave them."""
        return self._items[: self._position]

    def progress(self, journal: Journal) -> tuple[int, int]:
        """Done, and all there is to do: items, or samples with a limit."""
        if self._limit is None:
            return len(journal.offsets), len(self._items)
        return min(self._num_samples, self._limit), self._limit


def _while_needed(items: Iterable[Item], quota: _Quota) -> Iterator[Item]:
    for item in items:
        if quota.is_met:
            return
        yield item


def _faults(outcome: Outcome, key: str) -> list[Fault]:
    return [
        Fault(key, rejection.detail, rejection.traceback)
        for rejection in outcome.rejections
        if rejection.reason == CONVERTER_ERROR
    ]


# --- the output ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _work_folder(output: Output) -> Generator[Path, None, None]:
    """Hold the work folder for this run alone; it stays as long as a journal is in it.

    So does what was fetched from an address, where the run was interrupted.
    """
    import fcntl

    work = output.work
    is_new = not work.parent.exists()
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another conversion is writing to {output}; wait for it") from None
        is_fetched = False
        try:
            yield work
        except (KeyboardInterrupt, OSError):
            is_fetched = any(path.is_dir() for path in work.glob(f"{FETCHED}*"))
            raise
        finally:
            if not is_fetched and not (work / JOURNAL).exists():
                shutil.rmtree(work)
                if is_new and not any(work.parent.iterdir()):
                    work.parent.rmdir()


def _absolute(output: Output) -> Output:
    """For processes in other folders."""
    location = output.location("")
    return open_output(location.absolute() if isinstance(location, Path) else location)


def _check_not_foreign(output: Output, name: str) -> None:
    """Refuse a folder whose images or samples are not ours: they would be mixed, or lost."""
    if output.is_begun() or output.size(MANIFEST) is not None:
        return
    for found in output.names():
        if found == IMAGES or (found.startswith(f"{name}_") and found.endswith(".jsonl")):
            raise ValueError(f"{output} holds {found} of other origin; choose an empty --out_dir")


def _remove_output(output: Output, work: Path) -> None:
    """Remove what a conversion writes, the marks that it is ours last."""
    output.remove(IMAGES)
    manifest = _read_manifest(output)
    for name in [*manifest.get("files", {}), REJECTED, CARD, MANIFEST]:
        output.remove(Path(name).name)
    _remove_journal(output, work)


def _remove_journal(output: Output, work: Path) -> None:
    (work / JOURNAL).unlink(missing_ok=True)
    output.finish()


def _read_manifest(output: Output) -> dict[str, Any]:
    if output.size(MANIFEST) is None:
        return {}
    try:
        manifest = json.loads(output.read(MANIFEST))
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or "run" not in manifest:
        raise ValueError(
            f"{output.location(MANIFEST)} is not a conversion's manifest; choose an empty --out_dir"
        )
    return manifest  # pyright: ignore[reportUnknownVariableType]


def _read_finished(
    output: Output, identity: dict[str, Any], *, is_listed: bool
) -> ConversionResult | None:
    """The result of a finished run of this identity; None where none is there."""
    manifest = _read_manifest(output)
    if not manifest:
        return None
    _check_same_run(manifest["run"], identity, output, partial=not is_listed)
    for name, facts in manifest["files"].items():
        if output.size(name) != facts["bytes"]:
            raise ValueError(
                f"{output.location(name)} is gone or has changed since it was written; "
                "--overwrite converts anew"
            )
    return _result(output, manifest, manifest["num_items"])


def _check_same_run(
    then: dict[str, Any], now: dict[str, Any], output: Output, *, partial: bool = False
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
            f"{output} holds another conversion: {'; '.join(differences)}. "
            "Use the same settings to continue it, another --out_dir, or --overwrite to start anew"
        )


def _flatten(identity: dict[str, Any]) -> dict[str, Any]:
    settings = {f"setting {k}": v for k, v in identity.get("settings", {}).items()}
    return {k: v for k, v in identity.items() if k != "settings"} | settings


def _write_output(
    converter: Converter,
    items: Sequence[Item],
    journal: Journal,
    output: Output,
    identity: dict[str, Any],
) -> ConversionResult:
    """Write the JSONL files from the journal, in the order of items, and the manifest last."""
    splits = list(dict.fromkeys(item.split for item in items))
    names = {split: f"{converter.name}_{split}.jsonl" for split in splits}
    limit: int | None = identity["limit"]
    facts = CardFacts(converter, identity, splits)
    faults: dict[str, Fault] = {}
    kept_images: set[str] = set()
    may_have_surplus = limit is not None or journal.num_rejected > 0
    with contextlib.ExitStack() as stack:
        files = {
            name: HashedFile(stack.enter_context(output.open(name))) for name in names.values()
        }
        for item in items:
            outcome = journal.read(item.index)
            if limit is not None:
                outcome = outcome.first(limit - facts.num_samples)
            for line in outcome.samples:
                files[names[item.split]].write(line.encode() + b"\n")
                images = facts.add_sample(item.split, line)
                if may_have_surplus:
                    kept_images.update(images)
            for rejection in outcome.rejections:
                if REJECTED not in files:
                    files[REJECTED] = HashedFile(stack.enter_context(output.open(REJECTED)))
                entry: dict[str, object] = {
                    "item": item.key,
                    "index": item.index,
                    "reason": rejection.reason,
                    "detail": rejection.detail,
                }
                if rejection.traceback:
                    entry["traceback"] = rejection.traceback
                files[REJECTED].write(json.dumps(entry).encode() + b"\n")
                facts.rejected[rejection.reason] += 1
            for fault in _faults(outcome, item.key):
                faults.setdefault(fault.detail.partition(":")[0] + str(fault.traceback[-1:]), fault)
        facts.add_sources(items)
        files[CARD] = HashedFile(stack.enter_context(output.open(CARD)))
        files[CARD].write(render_card(facts).encode())
    # Of what workers did beyond the limit, and of items that were broken off, nothing stays.
    if limit is not None or facts.rejected.keys() & {CONVERTER_ERROR, WORKER_DIED}:
        for image in [name for name in output.image_names() if name not in kept_images]:
            output.remove_image(image)
    manifest = {
        "run": identity,
        "num_items": len(items),
        "splits": names,
        "counts": facts.counts,
        "rejected": dict(sorted(facts.rejected.items(), key=lambda pair: (-pair[1], pair[0]))),
        "files": {
            name: {"bytes": file.num_bytes, "sha256": file.sha256} for name, file in files.items()
        },
    }
    with output.open(MANIFEST) as file:
        file.write((json.dumps(manifest, indent=2) + "\n").encode())
    result = _result(output, manifest, 0)
    return dataclasses.replace(result, faults=tuple(faults.values()))


def _result(output: Output, manifest: dict[str, Any], num_reused: int) -> ConversionResult:
    return ConversionResult(
        out_dir=output.location(""),
        files={split: output.location(name) for split, name in manifest["splits"].items()},
        counts=manifest["counts"],
        rejected=manifest["rejected"],
        rejected_file=output.location(REJECTED) if manifest["rejected"] else None,
        num_items=manifest["num_items"],
        num_reused=num_reused,
    )
