r"""What a checkpoint holds, and how it is written whole or not at all.

    runs/first/checkpoints/
        latest                    "step-00000200\n": the one to go on from
        best                      "step-00000150\n": the one with the best score, if any has one
        step-00000150/
        step-00000200/
            state.json            step, score, data and settings it belongs to
            *.distcp, .metadata   trainable weights and optimizer moments (or an engine's own files)

Weights that don't train are not in there: they come from the model folder, whose hash is in
`state.json`. Random state is not saved: it is seeded from (seed, step, row).

A checkpoint is written under a temporary name, flushed, renamed, and only then `latest` is turned
to it. One that goes is renamed before it is removed. So a folder `step-N` is whole at any moment,
and `settle` brings the rest (`best`, those that should be gone) in line with what is there.
"""

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import xxhash
from phi3v_data.atomic import TEMPORARY_MARK, sync, write_atomic
from torch.distributed.checkpoint.api import CheckpointException

from phi3v_train.config import maths_changes
from phi3v_train.engine import World
from phi3v_train.plan import PlanSettings, plan_changes
from phi3v_train.retention import Keep, Kept, Score, ranked, steps_to_remove

FORMAT_VERSION = 1
"""Raised when older code could not read what newer code writes, or the other way round."""

STATE_FILE = "state.json"


class CheckpointError(ValueError):
    """A checkpoint can't be used. One line: which, why, and the way out."""


class Holder(Protocol):
    """Who has weights, moments and loss scale: an engine. All ranks call it together."""

    @property
    def state_format(self) -> str:
        """Of the files it writes; it reads no others. In `state.json`."""
        ...

    def save(self, folder: Path) -> None:
        """Write into the folder, which exists."""
        ...

    def load(self, folder: Path) -> None:
        """Read into the running objects; ValueError where that can't be done."""
        ...


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run is, and what run it is."""

    step: int
    """Optimizer steps done, over all epochs."""
    plan: PlanSettings
    """Of the data stream: what `step` is a position of."""
    maths: dict[str, Any]
    """The settings that decide what the weights become."""
    model_hash: str
    """Of the weights the run started from."""
    state_format: str = "dcp"
    """Of the other files, `dcp` or `deepspeed`; see `phi3v_train.engine`."""
    score: Score | None = None
    """Of these weights, where they were evaluated."""

    def to_json(self) -> str:
        """As in `state.json`."""
        content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return json.dumps(content, indent=2) + "\n"


def model_hash(folder: str | Path) -> str:
    """xxh3-128 over the weight files of a model folder, in the order of their names."""
    digest = xxhash.xxh3_128()
    for path in sorted(Path(folder).glob("*.safetensors")):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


# --- which there are ------------------------------------------------------------------------------


def checkpoint_folder(output_dir: Path) -> Path:
    """Where the checkpoints of a run are."""
    return output_dir / "checkpoints"


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint to go on from, or None where there is none.

    Raises:
        CheckpointError: `latest` names a folder that is not a checkpoint.
    """
    return _pointed_at(output_dir, "latest")


def best_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint with the best score, or None where none has one.

    Raises:
        CheckpointError: `best` names a folder that is not a checkpoint.
    """
    return _pointed_at(output_dir, "best")


def _pointed_at(output_dir: Path, name: str) -> Path | None:
    pointer = checkpoint_folder(output_dir) / name
    if not pointer.is_file():
        return None
    path = pointer.parent / pointer.read_text().strip()
    if not (path / STATE_FILE).is_file():
        raise CheckpointError(
            f"{pointer} names {path.name}, which is not a checkpoint: it has no {STATE_FILE}; "
            "write the name of another step-* folder into it, or use another output_dir"
        )
    return path


def best_score(output_dir: Path) -> Score | None:
    """The score of the best checkpoint on disk."""
    order = ranked(_kept(checkpoint_folder(output_dir)))
    return order[0].score if order else None


def _kept(folder: Path) -> list[Kept]:
    """The checkpoints in a folder that can be read.

    One that can't (of another format, edited) is nobody's to go on from and nobody's to remove.
    """
    kept: list[Kept] = []
    for path in sorted(folder.glob("step-????????")):
        try:
            state = read_state(path)
        except CheckpointError:
            continue
        kept.append(Kept(state.step, state.score))
    return kept


def _name(step: int) -> str:
    return f"step-{step:08d}"


# --- what is in one -------------------------------------------------------------------------------


def read_state(path: Path) -> RunState:
    """Read the `state.json` of a checkpoint.

    Raises:
        CheckpointError: it is not a checkpoint, or one of another format.
    """
    file = path / STATE_FILE
    try:
        content = json.loads(file.read_text())
        version = content["format_version"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a checkpoint: it has no {STATE_FILE}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {version}, this program reads {FORMAT_VERSION}; go on "
            "with the release that wrote it, or start anew in another output_dir"
        )
    try:
        score = content.get("score")  # absent in the first release, as is the format
        return RunState(
            step=content["step"],
            plan=PlanSettings(**content["plan"]),
            maths=content["maths"],
            model_hash=content["model_hash"],
            state_format=content.get("state_format", "dcp"),
            score=None if score is None else Score(**score),
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None


def check_same_run(path: Path, then: RunState, now: RunState) -> None:
    """Refuse a checkpoint of other data, settings or weights.

    Raises:
        CheckpointError: names each field that changed, old and new.
    """
    changes = [
        *plan_changes(dataclasses.asdict(then.plan), now.plan),
        *maths_changes(then.maths, now.maths),
    ]
    if then.model_hash != now.model_hash:
        changes.append(f"weights of the model: {then.model_hash} -> {now.model_hash}")
    if changes:
        raise CheckpointError(
            f"{path} belongs to another run: {'; '.join(dict.fromkeys(changes))}. Set these back "
            "to go on with it, or use another output_dir (or --overwrite) to start anew"
        )


def check_format(path: Path, then: str, now: str) -> None:
    """Refuse a checkpoint that the engine can't read.

    Raises:
        CheckpointError: with the engines that can.
    """
    if then != now:
        able = {"dcp": "single, ddp or fsdp2", "deepspeed": "the zero1, zero2 or zero3 it was"}
        raise CheckpointError(
            f"{path} holds files of format {then}, and the engine of this run reads {now}; go on "
            f"with parallel.engine={able.get(then, 'the one that wrote it')}"
        )


# --- writing and reading --------------------------------------------------------------------------


def save_checkpoint(
    output_dir: Path, state: RunState, engine: Holder, world: World, keep: Keep
) -> Path:
    """Write a checkpoint, turn `latest` to it, and `best` where it is that; remove older ones.

    Args:
        output_dir: of the run.
        state: position, score and identity; its format is the engine's.
        engine: that writes the rest.
        world: all of its processes call this.
        keep: what stays.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: it can't be written. Those that were there are as they were.
    """
    assert state.state_format == engine.state_format
    folder = checkpoint_folder(output_dir)
    path = folder / _name(state.step)
    temporary = folder / f"{path.name}.tmp"
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    world.barrier()
    try:
        engine.save(temporary)
        world.barrier()
        if world.is_main:
            write_atomic(temporary / STATE_FILE, state.to_json())
            _sync_all(temporary)
    except (CheckpointException, OSError) as error:
        raise CheckpointError(f"{temporary} cannot be written: {_reason(error)}") from error
    if world.is_main:
        if path.exists():  # of an attempt that was killed before `latest` was turned to it
            _remove(path)
        os.replace(temporary, path)
        sync(folder)
        write_atomic(folder / "latest", f"{path.name}\n")
        settle(output_dir, keep)
    world.barrier()
    return path


def _sync_all(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def _reason(error: BaseException) -> str:
    """In one line; torch's exception lists what each rank met."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return " ".join(f"{type(error).__name__} {error}".split())


def settle(output_dir: Path, keep: Keep) -> None:
    """Turn `best` to the best checkpoint, remove those that don't stay, and half of ones.

    Changes nothing where a run was not interrupted; one process calls it.
    """
    folder = checkpoint_folder(output_dir)
    if not folder.is_dir():
        return
    for left in [*folder.glob("step-*.tmp"), *folder.glob(f".*{TEMPORARY_MARK}*")]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    kept = _kept(folder)
    order = ranked(kept)
    if order:
        best = f"{_name(order[0].step)}\n"
        pointer = folder / "best"
        if not pointer.is_file() or pointer.read_text() != best:
            write_atomic(pointer, best)
    latest = latest_checkpoint(output_dir)
    for step in steps_to_remove(kept, keep):
        path = folder / _name(step)
        if path != latest:
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint so that no half of it is ever there under its name."""
    gone = path.with_name(f"{path.name}.gone.tmp")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone)


def load_checkpoint(path: Path, engine: Holder) -> None:
    """Read weights, moments and loss scale of a checkpoint into the running objects.

    Raises:
        ValueError: its files are damaged, of another format, or hold other tensors.
    """
    check_format(path, read_state(path).state_format, engine.state_format)
    engine.load(path)
