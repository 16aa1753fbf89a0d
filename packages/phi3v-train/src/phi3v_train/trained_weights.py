"""The weights in a checkpoint, read in one process, whatever engine and ranks wrote them.

    trained = read_trained(Path("runs/first/checkpoints/step-00000200"))
    trained["model.layers.0.self_attn.qkv_proj.weight"]        # whole, on the CPU

Only those that train are in there; the others come from the model folder.
"""

import pickle
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from phi3v_train.checkpoint import CheckpointError, read_state
from phi3v_train.quiet import quiet

_GROUP = "model."
"""In front of the weights' own names, beside the moments."""


def read_trained(checkpoint: Path) -> dict[str, Tensor]:
    """Weights by official name.

    Raises:
        CheckpointError: no checkpoint, or damaged files.
    """
    state_format = read_state(checkpoint).state_format
    if state_format != "dcp":
        raise CheckpointError(
            f"{checkpoint} holds files of format {state_format}, and only dcp is read here; let "
            "the run come to its end, which writes its model or adapter folder"
        )
    reader = FileSystemReader(checkpoint)
    try:
        listed = reader.read_metadata().state_dict_metadata
        weights = {
            name.removeprefix(_GROUP): torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in listed.items()
            if name.startswith(_GROUP) and isinstance(entry, TensorStorageMetadata)
        }
        # torch warns that one process is taken for one, though `no_dist` says so
        with quiet("torch.distributed is disabled"):
            load({"model": weights}, storage_reader=reader, no_dist=True)
    except (CheckpointException, OSError, EOFError, pickle.UnpicklingError) as error:
        if isinstance(error, CheckpointException):
            error = next(iter(error.failures.values()))[0]
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise CheckpointError(f"{checkpoint} cannot be read: {reason}") from error
    return weights
