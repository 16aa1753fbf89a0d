"""A checkpoint, or the newest or best one of a run, as a folder that others load.

    export_checkpoint(Path("runs/lora"), Path("out"))                            # the newest
    export_checkpoint(Path("runs/lora/checkpoints/step-00000200"), Path("out"))

    runs/lora/config.yaml    which model, which method
    model folder             weights that didn't train, tokenizer and processor files
    checkpoint               weights that did

The result of full training is a model folder in the dtype of the model it started from. Adapters
are merged into it, or written as a PEFT folder.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from phi3v_train.checkpoint import (
    STATE_FILE,
    CheckpointError,
    RunState,
    best_checkpoint,
    latest_checkpoint,
    model_hash,
    read_state,
)
from phi3v_train.config import MethodConfig, TrainConfig, load_config
from phi3v_train.export import check_adapter_export, check_export, export_adapter, export_model
from phi3v_train.merge import merge_checked, refuse_existing
from phi3v_train.methods import TrainingModel, load_to_train, read_model_config
from phi3v_train.trained_weights import read_trained


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    path: Path
    checkpoint: Path
    step: int
    kind: str
    """`model`, `merged model` or `adapter`."""
    is_checked: bool
    """Whether the folder was read again and compared."""

    def __str__(self) -> str:
        checked = "; read again and found equal" * self.is_checked
        return f"{self.path}: {self.kind} of step {self.step}, from {self.checkpoint}{checked}"


def export_checkpoint(
    source: Path,
    out_dir: Path,
    *,
    model: Path | None = None,
    best: bool = False,
    adapter_only: bool = False,
    check: bool = False,
) -> Exported:
    """Write a checkpoint as a Hugging Face or PEFT folder.

    Args:
        source: a run's folder, or one of its checkpoints.
        out_dir: the folder to make.
        model: the model folder it started from; None: where the run's configuration says.
        best: of a run: the checkpoint with the best score instead of the newest.
        adapter_only: write adapters as a PEFT folder instead of merging them.
        check: read the written folder again and compare it.

    Raises:
        ValueError: no checkpoint, another model, or a folder that is in use; one line.
    """
    checkpoint = find_checkpoint(source, best=best)
    config = _config_of(checkpoint)
    if adapter_only and not config.method.has_adapters:
        raise ValueError(
            f"{checkpoint} has no adapters: method.name is {config.method.name}; leave "
            "--adapter_only out"
        )
    refuse_existing(out_dir)
    base = model if model is not None else config.model
    state = read_state(checkpoint)
    _check_base(base, checkpoint, state)
    dtype = read_model_config(base).dtype or torch.float32
    assert isinstance(dtype, torch.dtype)

    trained = read_trained(checkpoint)
    # Adapters of QLoRA stand beside the same layers; what they are added to is the base as saved.
    name = "lora" if config.method.has_adapters else "full"
    method = MethodConfig.model_validate({**config.method.model_dump(), "name": name})
    training = load_to_train(base, method, "fp32", seed=config.seed)
    put_trained(training, trained, checkpoint)
    kind = "model"
    if training.adapters is None:
        export_model(training.model, base, out_dir, dtype)
    elif adapter_only:
        kind = "adapter"
        export_adapter(training.adapters, base, out_dir)
    else:
        kind = "merged model"
        merged, _, _ = merge_checked(training.adapters, dtype)
        export_model(merged, base, out_dir, dtype)
    if check and adapter_only:
        check_adapter_export(out_dir, training.model, base)
    elif check:
        check_export(out_dir, training.model, base)
    return Exported(out_dir, checkpoint, state.step, kind, check)


def find_checkpoint(source: Path, *, best: bool = False) -> Path:
    """The checkpoint that a folder is, or that a run's folder has.

    Raises:
        CheckpointError: there is none.
    """
    if (source / STATE_FILE).is_file():
        if best:
            raise CheckpointError(
                f"{source} is one checkpoint; --best chooses among those of a run"
            )
        return source
    found = best_checkpoint(source) if best else latest_checkpoint(source)
    if found is None:
        missing = "has no checkpoint with a score" if best else "has no checkpoint"
        raise CheckpointError(
            f"{source} {missing}; expected a run's output_dir, or one of its checkpoints/step-*"
        )
    return found


def put_trained(training: TrainingModel, trained: dict[str, Tensor], checkpoint: Path) -> None:
    """Put the weights of a checkpoint into a prepared model, in place.

    Raises:
        CheckpointError: other weights than those that train.
    """
    places = training.trainable
    if places.keys() != trained.keys():
        odd = sorted(places.keys() ^ trained.keys())
        raise CheckpointError(
            f"{checkpoint} does not hold what the method trains: {odd[0]} and {len(odd) - 1} more "
            "are in one of them only; config.yaml of the run has changed since"
        )
    with torch.no_grad():
        for name, parameter in places.items():
            parameter.copy_(trained[name])


def _config_of(checkpoint: Path) -> TrainConfig:
    path = checkpoint.resolve().parent.parent / "config.yaml"
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint} is not in a run's folder: there is no {path}, which says what trained"
        )
    return load_config(path)


def _check_base(base: Path, checkpoint: Path, state: RunState) -> None:
    read_model_config(base)  # says so where it is no model folder
    if model_hash(base) != state.model_hash:
        raise CheckpointError(
            f"{base} is not the model that {checkpoint} started from: its weights have another "
            "hash; say where that model is with --model"
        )
