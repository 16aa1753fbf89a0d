"""A conversations file as a shard directory, made once: what a run wants of a user who has JSONL.

    sharded("converted/ucf101_train.jsonl", num_crops=4)
    # ~/.cache/phi3v-train/shards/ucf101_train-6f0c…, validated and written now, or found there

The name holds the hash of the file's content, of its images' names, sizes and times, and of what
else decides the shards. So the same data is found again from any folder, and other data has another
name. Folders that are no longer wanted can be deleted; they are made anew when asked for.
"""

import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import xxhash
from phi3v_data.jsonl import default_image_root, read_samples, write_samples
from phi3v_data.locked_file import try_lock
from phi3v_data.schema import Sample
from phi3v_data.shard_format import MANIFEST
from phi3v_data.shard_writer import write_shards

MOST_NAMED = 3
"""Errors shown where a file is not valid."""


def shard_cache() -> Path:
    """`$XDG_CACHE_HOME/phi3v-train/shards`, or below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # Relative paths in it are to be ignored, says the XDG specification.
    folder = Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()
    return folder / "phi3v-train" / "shards"


def sharded(
    jsonl: str | Path,
    *,
    num_crops: int,
    choose: Callable[[Sequence[Sample]], Sequence[Sample]] | None = None,
    part: str = "",
    allow_missing_answer: bool = False,
    say: Callable[[str], None] | None = None,
) -> Path:
    """The shard directory of a file: validated and written, or found as it was.

    Several processes may ask at once: one writes, the others wait for it.

    Args:
        jsonl: conversations; images are in `images/` beside it, else in its folder.
        num_crops: most crops an image in training; a rule of validation asks.
        choose: takes some of the samples; none: all.
        part: names what `choose` takes, for the directory's name.
        allow_missing_answer: the last turn may lack its answer, as in test splits.
        say: called with a sentence before and after the work.

    Raises:
        ValueError: there is no such file, or samples have errors; the first ones are named.
    """
    path = Path(jsonl)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    samples = list(read_samples(path, allow_missing_answer=allow_missing_answer))
    images = default_image_root(path)
    # Where nothing is missing both ways give the same shards.
    is_open = any(sample.conversations[-1].assistant is None for sample in samples)
    key = _key(path, samples, images, f"{num_crops} {part}{' open' if is_open else ''}")
    name = f"{path.stem}{'-' + part if part else ''}-{key}"
    target = shard_cache() / name
    if (target / MANIFEST).is_file():
        _tell(say, f"{path}: shards are in {target}")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = try_lock(target.with_name(f"{name}.lock"), wait=True)
    try:
        if (target / MANIFEST).is_file():  # another process was first
            return target
        source = path
        if choose is not None:
            source = target.parent / f"{name}.jsonl"
            write_samples(source, choose(samples))
        _tell(say, f"{path}: validating and sharding into {target}")
        result = write_shards(
            [source],
            target,
            images=images,
            num_crops=num_crops,
            allow_missing_answer=is_open,
            use_cache=True,
        )
        if result.manifest is None:
            errors = [d for d in result.report.diagnostics if d.severity == "error"]
            shown = "; ".join(f"{d.code} {d.message}" for d in errors[:MOST_NAMED])
            raise ValueError(
                f"{path} is not valid, and nothing was done with it: {shown} "
                f"({len(errors)} errors in all; `phi3v-data validate {path}` shows them)"
            )
    finally:
        if lock is not None:
            lock.close()
    return target


def _key(path: Path, samples: Sequence[Sample], images: Path, settings: str) -> str:
    digest = xxhash.xxh3_128(path.read_bytes())
    for name in sorted({image for sample in samples for image in sample.images}):
        try:
            state = os.stat(images / name)
        except OSError:  # validation says it better
            continue
        digest.update(f"{name}\0{state.st_size}\0{state.st_mtime_ns}\0".encode())
    digest.update(f"{version('phi3v-data')} {settings}".encode())
    return digest.hexdigest()[:16]


def _tell(say: Callable[[str], None] | None, text: str) -> None:
    if say is not None:
        say(text)
