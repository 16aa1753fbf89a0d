"""Where a run ran: what one asks first when two runs differ.

    record = environment()
    record["python"], record["packages"]["torch"], record["gpus"]     # "3.12.11", "2.11.0", [...]

    add_attempt("runs/first/env.json", record, start_step=120)

`env.json` has one entry per attempt, the first first: a run that went on elsewhere shows both.

    {"attempts": [{"started": "2026-01-31T12:00:00+00:00", "start_step": 0, "command": [...],
                   "python": "3.12.11", "platform": "Linux-6.8...", "host": "node-1",
                   "processes": 8, "cores": 16, "packages": {"torch": "2.11.0", ...},
                   "cuda": "12.8", "gpus": [...], "variables": {"CUDA_VISIBLE_DEVICES": "0,1"}}]}
"""

import importlib.metadata
import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from phi3v_data.atomic import write_atomic

from phi3v_train.rank_place import rank_place

PACKAGES = (
    "phi3v-train", "phi3v-data", "torch", "transformers", "peft", "accelerate", "bitsandbytes",
    "deepspeed", "flash-attn", "triton", "safetensors", "tokenizers", "numpy", "pillow", "pyarrow",
)  # fmt: skip
"""Whose versions can change what a run does or how fast."""

VARIABLES = ("CUDA_", "NCCL_", "TORCH", "PYTORCH_", "OMP_", "SLURM_JOB", "HF_HUB_OFFLINE", "DS_")
"""Beginnings of the names of variables that are recorded; nothing else of the environment is."""

LAUNCHER = ("TORCHELASTIC_", "TORCH_ELASTIC_")
"""Of the launcher to its processes: the same for every run."""


def environment() -> dict[str, Any]:
    """What this process runs in, as JSON would have it."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "processes": rank_place(os.environ).world_size,
        "cores": len(os.sched_getaffinity(0)),
        "packages": package_versions(),
        "cuda": torch.version.cuda,
        "gpus": _gpus(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(VARIABLES) and not name.startswith(LAUNCHER)
        },
    }


def package_versions() -> dict[str, str]:
    """Versions of `PACKAGES`, of those that are installed."""
    versions: dict[str, str] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "compute_capability": f"{properties.major}.{properties.minor}",
            }
        )
    return found


def add_attempt(path: Path, record: dict[str, Any], *, start_step: int) -> None:
    """Append an attempt to `env.json`.

    Args:
        path: the file; it need not be there.
        record: of `environment`.
        start_step: steps that were done when it began.

    Raises:
        ValueError: what is there is no `env.json`.
    """
    attempts = read_attempts(path)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    attempts.append({"started": started, "start_step": start_step, "command": sys.argv, **record})
    write_atomic(path, json.dumps({"attempts": attempts}, indent=2) + "\n")


def read_attempts(path: Path) -> list[dict[str, Any]]:
    """The attempts in an `env.json`; none where there is no file.

    Raises:
        ValueError: it is no such file.
    """
    if not path.is_file():
        return []
    try:
        attempts = json.loads(path.read_text(encoding="utf-8"))["attempts"]
        if not isinstance(attempts, list):
            raise TypeError("attempts is no list")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the env.json of a run: {error}; remove it") from None
    return attempts
