"""What the recipe's scripts train and evaluate on: a folder of JSONL to two shard directories.

    converted/                          --task hateful_memes --data_dir converted
        images/…
        hateful_memes_train.jsonl       → data.train
        hateful_memes_dev_seen.jsonl    → data.eval

Where there is no evaluation split, as in the Cauldron's data, the first 500 training samples are
held out, as in the recipe.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from phi3v_data.schema import Sample

from phi3v_train.model_place import find_model
from phi3v_train.recipe_flags import (
    TASKS,
    RecipeFlags,
    Task,
    TaskDefaults,
    find_file,
    translate,
)
from phi3v_train.sharded_jsonl import sharded

Say = Callable[[str], None]


def recipe_overrides(
    flags: RecipeFlags, own: Sequence[str], *, has_config: bool, has_gpu: bool, say: Say
) -> tuple[str, ...]:
    """A recipe's command line as settings, its model found and its data sharded.

    Args:
        flags: the recipe's.
        own: `key=value` settings of the same command line; they come last and win.
        has_config: a YAML file was named; the task's default model is then not looked for.
        has_gpu: see `recipe_flags.translate`.
        say: called with what is done, and with what a flag means no more.

    Raises:
        ValueError: a model or data that is not there, or samples with errors.
    """
    translation = translate(flags, has_gpu=has_gpu)
    for note in translation.notes:
        say(note)
    model = flags.model_name_or_path
    names_model = has_config or any(setting.startswith("model=") for setting in own)
    if model is None and flags.task is not None and not names_model:
        model = TASKS[flags.task].model
    found = () if model is None else (f"model={find_model(model)}",)
    data = data_overrides(flags, _own_num_crops(own) or flags.num_crops, say)
    return (*translation.overrides, *found, *data, *own)


def _own_num_crops(own: Sequence[str]) -> int | None:
    """What a setting beside the flags says, where it is a number: data is validated for it."""
    values = [text.partition("=")[2] for text in own if text.startswith("data.num_crops=")]
    return int(values[-1]) if values and values[-1].isdecimal() else None


def data_overrides(flags: RecipeFlags, num_crops: int | None, say: Say) -> tuple[str, ...]:
    """`data.train` and `data.eval` of a recipe's command line; sharded now, or found in the cache.

    Args:
        flags: with `--data_dir`, or nothing is to be done.
        num_crops: most crops an image; None: the task's.
        say: called with what is done.

    Raises:
        ValueError: no `--task`, a file that is missing, or samples with errors.
    """
    if flags.data_dir is None:
        if flags.task is not None:
            raise ValueError(
                f"--task {flags.task} needs --data_dir: the folder that `phi3v-data convert "
                f"{flags.task}` wrote, with {flags.task}_train.jsonl in it"
            )
        return ()
    if flags.task is None:
        raise ValueError(f"--data_dir needs --task: one of {', '.join(TASKS)}")
    defaults = TASKS[flags.task]
    data_dir = Path(flags.data_dir)
    train = find_file(data_dir, flags.task, "train")
    if not train.is_file():
        raise ValueError(
            f"{train}: no such file; make it with `phi3v-data convert {flags.task} SOURCE "
            f"--out_dir {data_dir}`"
        )
    crops = num_crops or defaults.num_crops
    held_out = _eval_file(data_dir, flags.task, defaults)
    limit = None if flags.full_train else defaults.mini_train
    if held_out is not None:
        train_shards = (
            sharded(train, num_crops=crops, say=say)
            if limit is None
            else sharded(
                train, num_crops=crops, choose=lambda s: s[:limit], part=f"first-{limit}", say=say
            )
        )
        ask = _first_turns if defaults.asks_first_turn else None
        part = "first-turns" if ask else ""
        # A test split may have no answers: the trainer says what to do with it.
        eval_shards = sharded(
            held_out, num_crops=crops, choose=ask, part=part, allow_missing_answer=True, say=say
        )
    else:
        count = defaults.held_out
        if count is None:
            splits = " or ".join(
                find_file(data_dir, flags.task, s).name for s in defaults.eval_splits
            )
            raise ValueError(f"{data_dir}: no {splits} to evaluate on")
        say(f"{data_dir}: no split to evaluate on; the first {count} training samples are held out")
        train_shards = sharded(
            train, num_crops=crops, choose=lambda s: s[count:], part=f"after-{count}", say=say
        )
        eval_shards = sharded(
            train,
            num_crops=crops,
            choose=lambda s: _first_turns(s[:count]) if defaults.asks_first_turn else s[:count],
            part=f"held-out-{count}",
            say=say,
        )
    return (f"data.train={train_shards}", f"data.eval={eval_shards}")


def _eval_file(data_dir: Path, task: Task, defaults: TaskDefaults) -> Path | None:
    for split in defaults.eval_splits:
        path = find_file(data_dir, task, split)
        if path.is_file():
            return path
    return None


def _first_turns(samples: Sequence[Sample]) -> list[Sample]:
    """The first question of each conversation."""
    return [s.model_copy(update={"conversations": s.conversations[:1]}) for s in samples]
