r"""What a checkpoint holds, and how it is written whole or not at all.

    runs/first/checkpoints/
        latest                    "step-00000200\n": the one to go on from
        step-00000200/
            state.json            step, data and settings it belongs to
            *.distcp, .metadata   trainable weights and optimizer moments

Weights and moments are `torch.distributed.checkpoint` files: each rank writes its share, and
another number of ranks can read them. Weights that don't train are not in there: they come from
the model folder, whose hash is in `state.json`.

A checkpoint is written under a temporary name, flushed, renamed, and only then `latest` is turned
to it. Random state is not saved: it is seeded from (seed, step, row).
"""

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from phi3v_data.atomic import sync, write_atomic
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from phi3v_train.config import maths_changes
from phi3v_train.engine import World
from phi3v_train.plan import PlanSettings, plan_changes
from phi3v_train.quiet import quiet

FORMAT_VERSION = 1
"""Raised when older code could not read what newer code writes, or the other way round."""

STATE_FILE = "state.json"

_ONE_PROCESS = "torch.distributed is disabled"
"""torch warns that a run of one process is taken for one, though `no_dist` says so."""


class CheckpointError(ValueError):
    """A checkpoint can't be used. One line: which, why, and the way out."""


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


def checkpoint_folder(output_dir: Path) -> Path:
    """Where the checkpoints of a run are."""
    return output_dir / "checkpoints"


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint to go on from, or None where there is none.

    Raises:
        CheckpointError: `latest` names a folder that is not a checkpoint.
    """
    pointer = checkpoint_folder(output_dir) / "latest"
    if not pointer.is_file():
        return None
    path = pointer.parent / pointer.read_text().strip()
    if not (path / STATE_FILE).is_file():
        raise CheckpointError(
            f"{pointer} names {path.name}, which is not a checkpoint: it has no {STATE_FILE}; "
            "write the name of another step-* folder into it, or use another output_dir"
        )
    return path


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
        return RunState(
            step=content["step"],
            plan=PlanSettings(**content["plan"]),
            maths=content["maths"],
            model_hash=content["model_hash"],
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


def save_checkpoint(
    output_dir: Path,
    state: RunState,
    trainable: dict[str, nn.Parameter],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: dict[str, Any],
    world: World,
    *,
    keep: int,
) -> Path:
    """Write a checkpoint, turn `latest` to it and remove older ones.

    Args:
        output_dir: of the run.
        state: position and identity.
        trainable: the weights that train, by name.
        model: that holds them, unwrapped.
        optimizer: over them.
        scaler: `state_dict` of the loss scaler; empty where there is none.
        world: all of its processes call this.
        keep: newest checkpoints that stay.

    Returns:
        The checkpoint's folder.
    """
    folder = checkpoint_folder(output_dir)
    path = folder / f"step-{state.step:08d}"
    temporary = folder / f"{path.name}.tmp"
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    world.barrier()
    with quiet(_ONE_PROCESS):
        save(
            _tensors(trainable, model, optimizer, scaler),
            storage_writer=FileSystemWriter(temporary, single_file_per_rank=True, sync_files=True),
            no_dist=world.world_size == 1,
        )
    world.barrier()
    if world.is_main:
        write_atomic(temporary / STATE_FILE, state.to_json())
        sync(temporary)
        if path.exists():  # of a run that was started anew over it
            shutil.rmtree(path)
        os.replace(temporary, path)
        sync(folder)
        write_atomic(folder / "latest", f"{path.name}\n")
        for old in sorted(folder.glob("step-????????"))[:-keep]:
            if old != path:
                shutil.rmtree(old)
    world.barrier()
    return path


def load_checkpoint(
    path: Path,
    trainable: dict[str, nn.Parameter],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    world: World,
) -> None:
    """Read weights, moments and scaler of a checkpoint into the running objects.

    Raises:
        CheckpointError: its files are damaged, or hold other tensors.
    """
    content = _tensors(trainable, model, optimizer, scaler.state_dict())
    try:
        with quiet(_ONE_PROCESS):
            load(
                content,
                storage_reader=FileSystemReader(path),
                no_dist=world.world_size == 1,
            )
    except CheckpointException as error:  # a BaseException: what each rank met, in one
        cause = next(iter(error.failures.values()))[0]
        reason = " ".join(f"{type(cause).__name__} {cause}".split())
        raise CheckpointError(f"{path} cannot be read: {reason}") from error
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(content["model"][name])
    set_optimizer_state_dict(
        model, optimizer, content["optimizer"], options=StateDictOptions(strict=False)
    )
    if content["scaler"]:
        scaler.load_state_dict(content["scaler"])


def _tensors(
    trainable: dict[str, nn.Parameter],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: dict[str, Any],
) -> dict[str, Any]:
    return {
        "model": {name: parameter.detach() for name, parameter in trainable.items()},
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "scaler": scaler,
    }
