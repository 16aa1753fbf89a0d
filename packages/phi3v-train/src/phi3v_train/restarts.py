"""`--overwrite` under a launcher that restarts: an attempt must not remove what the last one did.

    torchrun --max_restarts=3 ... launch --overwrite

    attempt 0    removes the earlier run, notes the launcher's run in checkpoints/.started_by
    attempt 1    finds its own run noted there: goes on from the newest checkpoint

An attempt that failed before it removed anything has noted nothing, and the next one overwrites.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from phi3v_data.atomic import write_atomic

from phi3v_train.checkpoint import checkpoint_folder

_RUN = "TORCHELASTIC_RUN_ID"
_COUNT = "TORCHELASTIC_RESTART_COUNT"


def note_start(output_dir: Path, environment: Mapping[str, str] = os.environ) -> None:
    """Say whose run the checkpoints of `output_dir` will be, if a launcher may restart it."""
    if _RUN in environment:
        write_atomic(_note(output_dir), environment[_RUN])


def has_started(output_dir: Path, environment: Mapping[str, str] = os.environ) -> bool:
    """Is this a later attempt of the run that the checkpoints of `output_dir` belong to?"""
    if environment.get(_COUNT, "0") == "0" or not _note(output_dir).is_file():
        return False
    return _note(output_dir).read_text() == environment.get(_RUN)


def _note(output_dir: Path) -> Path:
    return checkpoint_folder(output_dir) / ".started_by"
