r"""The command line of the cookbook's fine-tuning scripts, as settings of ours.

    torchrun --nproc_per_node=8 finetune_hf_trainer_ucf101.py --data_dir ucf101 \
        --batch_size 64 --use_flash_attention --use_lora --lora_rank 32            # then
    phi3v-train launch --nproc 8 --task ucf101 --data_dir ucf101 \
        --batch_size 64 --use_flash_attention --use_lora --lora_rank 32            # now

    precision=bf16 method.name=lora method.lora.rank=32 train.global_batch_size=64 ...

With `--task` the script's own defaults count (model, crops, fp16 unless bf16 is asked for,
evaluation before and after). Without it a flag is the setting it names, and no more. A setting
written as `key=value` beats a flag. docs/from-the-recipe.md is the table.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import click

Task = Literal["docvqa", "hateful_memes", "nlvr2", "ucf101"]


@dataclass(frozen=True, slots=True)
class TaskDefaults:
    """What one of the four scripts sets."""

    model: str = "microsoft/Phi-3.5-vision-instruct"
    """Name on the hub."""
    num_crops: int = 16
    metric: Literal["accuracy", "anls"] = "accuracy"
    flash_means_bf16: bool = False
    """Whether `--use_flash_attention` implies `--bf16`."""
    eval_splits: tuple[str, ...] = ("val",)
    """Where to look for what is evaluated on: the first that is there."""
    held_out: int | None = None
    """Samples of the training file to evaluate on, where there is no such split."""
    mini_train: int | None = None
    """Samples trained on without `--full_train`."""
    mini_eval: int | None = None
    """Samples evaluated on."""
    asks_first_turn: bool = False
    """Evaluate on the first question of each conversation."""


_OLDER_MODEL = "microsoft/Phi-3-vision-128k-instruct"

TASKS: dict[Task, TaskDefaults] = {
    "docvqa": TaskDefaults(
        model=_OLDER_MODEL,
        metric="anls",
        eval_splits=("val", "test"),
        mini_train=1000,
        mini_eval=200,
    ),
    "hateful_memes": TaskDefaults(
        model=_OLDER_MODEL, eval_splits=("dev_seen", "dev", "val"), held_out=500
    ),
    "nlvr2": TaskDefaults(
        flash_means_bf16=True, eval_splits=("dev", "val"), held_out=500, asks_first_turn=True
    ),
    "ucf101": TaskDefaults(num_crops=4, flash_means_bf16=True),
}


@dataclass(frozen=True, slots=True)
class RecipeFlags:
    """The recipe's options, as given; None or False: not given."""

    task: Task | None = None
    data_dir: str | None = None
    output_dir: str | None = None
    model_name_or_path: str | None = None
    use_lora: bool = False
    use_qlora: bool = False
    use_flash_attention: bool = False
    bf16: bool = False
    batch_size: int | None = None
    batch_size_per_gpu: int | None = None
    num_crops: int | None = None
    num_train_epochs: int | None = None
    learning_rate: float | None = None
    wd: float | None = None
    lora_rank: int | None = None
    lora_alpha_ratio: float | None = None
    lora_dropout: float | None = None
    freeze_vision_model: bool = False
    full_train: bool = False
    no_tqdm: bool = False

    @property
    def is_any_given(self) -> bool:
        """Whether this is the recipe's command line at all."""
        return self != RecipeFlags()


@dataclass(frozen=True, slots=True)
class Translation:
    """Flags as settings."""

    overrides: tuple[str, ...]
    """`key=value` each, as `load_config` takes them. Where the data is, is not among them."""
    notes: tuple[str, ...]
    """What a flag has no meaning for any more, a sentence each."""


_PLAIN = {
    "output_dir": "output_dir",
    "batch_size": "train.global_batch_size",
    "num_crops": "data.num_crops",
    "num_train_epochs": "train.num_epochs",
    "learning_rate": "optim.learning_rate",
    "wd": "optim.weight_decay",
    "lora_rank": "method.lora.rank",
    "lora_alpha_ratio": "method.lora.alpha_ratio",
    "lora_dropout": "method.lora.dropout",
}
"""Flags that are one setting by another name."""


def translate(flags: RecipeFlags, *, has_gpu: bool) -> Translation:
    """The settings that mean what the flags mean.

    Args:
        flags: as given.
        has_gpu: fp16, the recipe's default, has no kernels on a CPU; there it becomes fp32.

    Raises:
        ValueError: flags that the recipe's scripts couldn't combine either.
    """
    task = TASKS[flags.task] if flags.task is not None else None
    overrides = _defaults(task) if task is not None else []
    for flag, key in _PLAIN.items():
        value = getattr(flags, flag)
        if value is not None:
            overrides.append(f"{key}={value}")
    if flags.use_qlora:  # implies use_lora
        overrides.append("method.name=qlora")
    elif flags.use_lora:
        overrides.append("method.name=lora")
    if flags.freeze_vision_model:  # the whole image part: the projector got no gradient either
        overrides.append("method.freeze=[vision, projector]")
    overrides += _precision(flags, task, has_gpu=has_gpu)
    return Translation(tuple(overrides), tuple(_notes(flags, task, has_gpu=has_gpu)))


def _defaults(task: TaskDefaults) -> list[str]:
    defaults = [
        "output_dir=output",
        f"data.num_crops={task.num_crops}",
        "method.gradient_checkpointing=true",
        "eval.before=true",
        f"eval.metric={task.metric}",
    ]
    if task.metric == "anls":
        defaults.append("eval.anls=recipe")
    if task.mini_eval is not None:
        defaults.append(f"eval.limit={task.mini_eval}")
    return defaults


def _wants_bf16(flags: RecipeFlags, task: TaskDefaults | None) -> bool:
    implied = flags.use_flash_attention and task is not None and task.flash_means_bf16
    return flags.bf16 or implied


def _precision(flags: RecipeFlags, task: TaskDefaults | None, *, has_gpu: bool) -> list[str]:
    if _wants_bf16(flags, task):
        return ["precision=bf16"]
    if task is None:
        return []
    return ["precision=fp16" if has_gpu else "precision=fp32"]


def _notes(flags: RecipeFlags, task: TaskDefaults | None, *, has_gpu: bool) -> list[str]:
    notes: list[str] = []
    if flags.batch_size_per_gpu is not None:
        notes.append(
            "--batch_size_per_gpu has no meaning any more: samples are packed into rows of "
            "data.max_tokens_per_row tokens, and --batch_size alone says how many make a step"
        )
    if flags.no_tqdm:
        notes.append("--no-tqdm is not needed: bars are shown on a terminal only")
    if flags.use_flash_attention:
        notes.append(
            "--use_flash_attention is not needed: attention is fused wherever the device can, in "
            "fp16 and bf16"
        )
    if flags.full_train and (task is None or task.mini_train is None):
        notes.append("--full_train has no meaning here: all training samples are used anyway")
    if task is not None and not has_gpu and not _wants_bf16(flags, task):
        notes.append("no GPU here: fp32 instead of the recipe's fp16")
    return notes


# --- the options ----------------------------------------------------------------------------------

_OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--task", {"type": click.Choice(list(TASKS)), "help": "As the recipe's script of this name."}),
    ("--data_dir", {"help": "Folder with TASK_train.jsonl, images/, and the evaluation split."}),
    ("--output_dir", {"help": "output_dir.  [with --task: output]"}),
    ("--model_name_or_path", {"help": "model: a folder, or OWNER/NAME on the hub."}),
    ("--use_lora", {"is_flag": True, "help": "method.name=lora"}),
    ("--use_qlora", {"is_flag": True, "help": "method.name=qlora"}),
    ("--use_flash_attention", {"is_flag": True, "help": "With nlvr2 and ucf101: --bf16."}),
    ("--bf16", {"is_flag": True, "help": "precision=bf16  [with --task: fp16]"}),
    ("--batch_size", {"type": click.IntRange(1), "help": "train.global_batch_size"}),
    ("--batch_size_per_gpu", {"type": click.IntRange(1), "help": "Taken, and means nothing."}),
    ("--num_crops", {"type": click.IntRange(1), "help": "data.num_crops"}),
    ("--num_train_epochs", {"type": click.IntRange(1), "help": "train.num_epochs"}),
    ("--learning_rate", {"type": float, "help": "optim.learning_rate"}),
    ("--wd", {"type": float, "help": "optim.weight_decay"}),
    ("--lora_rank", {"type": click.IntRange(1), "help": "method.lora.rank"}),
    ("--lora_alpha_ratio", {"type": float, "help": "method.lora.alpha_ratio"}),
    ("--lora_dropout", {"type": float, "help": "method.lora.dropout"}),
    ("--freeze_vision_model", {"is_flag": True, "help": "method.freeze=[vision, projector]"}),
    ("--full_train", {"is_flag": True, "help": "docvqa: all training samples, not 1,000."}),
    ("--no_tqdm", {"is_flag": True, "help": "Taken, and means nothing."}),
)


def with_recipe_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the recipe's options to a command, which gets them as `recipe`."""
    names = [field.name for field in fields(RecipeFlags)]

    @functools.wraps(command)
    def called(**params: Any) -> Any:
        given = {name: params.pop(name) for name in names}
        return command(**params, recipe=RecipeFlags(**given))

    decorated: Callable[..., Any] = called
    for name, settings in reversed(_OPTIONS):
        decorated = click.option(name, **settings)(decorated)
    return decorated


def find_file(data_dir: Path, task: Task, split: str) -> Path:
    """Where a split of a task is, as the converters name it."""
    return data_dir / f"{task}_{split}.jsonl"
