"""What an engine knows, as files for any number of ranks: weights that train, moments, loss scale.

    folder/
        *.distcp, .metadata    torch.distributed.checkpoint; each rank writes its share

    {"model": {"model.layers.0.…weight": …}, "optimizer": {…, by the same names}, "scaler": {…}}

Names are those of the model, whatever wraps it, and tensors are whole to the reader, however they
were shared out: what one engine wrote, another reads.
"""

from pathlib import Path
from typing import Any

import torch
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

from phi3v_train.methods import TrainingModel
from phi3v_train.quiet import quiet

_ONE_PROCESS = "torch.distributed is disabled"
"""torch warns that a run of one process is taken for one, though `no_dist` says so."""


def save_state(
    folder: Path,
    training: TrainingModel,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    world_size: int,
) -> None:
    """Write this rank's share into a folder that exists. All ranks call it."""
    with quiet(_ONE_PROCESS):
        save(
            _tensors(training, optimizer, scaler),
            storage_writer=FileSystemWriter(folder, single_file_per_rank=True, sync_files=True),
            no_dist=world_size == 1,
        )


def load_state(
    folder: Path,
    training: TrainingModel,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    world_size: int,
) -> None:
    """Read what `save_state` wrote, perhaps in another number of shares, into the running objects.

    Raises:
        ValueError: the files are damaged, or hold other tensors; one line.
    """
    content = _tensors(training, optimizer, scaler)
    try:
        with quiet(_ONE_PROCESS):
            load(content, storage_reader=FileSystemReader(folder), no_dist=world_size == 1)
    except CheckpointException as error:  # a BaseException: what each rank met, in one
        cause = next(iter(error.failures.values()))[0]
        reason = " ".join(f"{type(cause).__name__} {cause}".split())
        raise ValueError(f"{folder} cannot be read: {reason}") from error
    with torch.no_grad():
        for name, parameter in training.trainable.items():
            parameter.copy_(content["model"][name])
    set_optimizer_state_dict(
        training.model, optimizer, content["optimizer"], options=StateDictOptions(strict=False)
    )
    if content["scaler"]:
        scaler.load_state_dict(content["scaler"])


def _tensors(
    training: TrainingModel, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> dict[str, Any]:
    weights: dict[str, nn.Parameter] = training.trainable
    return {
        "model": {name: parameter.detach() for name, parameter in weights.items()},
        "optimizer": get_optimizer_state_dict(training.model, optimizer),
        "scaler": scaler.state_dict(),
    }
