import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from phi3v_data import open_shards, write_samples
from phi3v_train.cli import main
from phi3v_train.config import load_config
from phi3v_train.model_place import find_model
from phi3v_train.recipe_data import data_overrides, recipe_overrides
from phi3v_train.recipe_flags import RecipeFlags, Task, translate
from phi3v_train.sharded_jsonl import sharded

from tests.train.builders import log_lines, make_sample, write_picture


def settings_of(flags: RecipeFlags, *own: str, has_gpu: bool = True):
    overrides = translate(flags, has_gpu=has_gpu).overrides
    places = ("model=m", "data.train=t", "data.eval=e", "output_dir=o")
    known = {setting.partition("=")[0] for setting in overrides}
    rest = [place for place in places if place.partition("=")[0] not in known]
    return load_config(None, [*overrides, *rest, *own])


# --- flags ----------------------------------------------------------------------------------------


def test_every_flag_is_the_setting_it_names() -> None:
    config = settings_of(
        RecipeFlags(
            output_dir="out",
            use_lora=True,
            bf16=True,
            batch_size=64,
            num_crops=9,
            num_train_epochs=3,
            learning_rate=2e-4,
            wd=0.1,
            lora_rank=32,
            lora_alpha_ratio=0.5,
            lora_dropout=0.05,
            freeze_vision_model=True,
        )
    )
    assert config.output_dir == Path("out")
    assert (config.precision, config.method.name) == ("bf16", "lora")
    assert (config.train.global_batch_size, config.train.num_epochs) == (64, 3)
    assert (config.optim.learning_rate, config.optim.weight_decay) == (2e-4, 0.1)
    lora = config.method.lora
    assert (lora.rank, lora.lora_alpha, lora.dropout) == (32, 16, 0.05)
    assert config.method.freeze == ("vision", "projector")
    assert config.data.num_crops == 9


def test_without_a_task_a_flag_changes_nothing_else() -> None:
    assert translate(RecipeFlags(wd=0.0), has_gpu=True).overrides == ("optim.weight_decay=0.0",)
    assert not RecipeFlags().is_any_given


def test_qlora_implies_lora() -> None:
    assert settings_of(RecipeFlags(use_qlora=True)).method.name == "qlora"
    assert settings_of(RecipeFlags(use_qlora=True, use_lora=True)).method.name == "qlora"


@pytest.mark.parametrize(
    ("task", "num_crops", "metric", "limit", "flash"),
    [
        ("docvqa", 16, "anls", 200, "fp16"),
        ("hateful_memes", 16, "accuracy", None, "fp16"),
        ("nlvr2", 16, "accuracy", None, "bf16"),
        ("ucf101", 4, "accuracy", None, "bf16"),
    ],
)
def test_a_task_has_the_defaults_of_its_script(
    task: Task, num_crops: int, metric: str, limit: int | None, flash: str
) -> None:
    config = settings_of(RecipeFlags(task=task))
    assert config.output_dir == Path("output")
    assert (config.data.num_crops, config.eval.metric, config.eval.limit) == (
        *(num_crops, metric, limit),
    )
    assert (config.precision, config.method.name, config.method.freeze) == ("fp16", "full", ())
    assert config.eval.before
    assert config.eval.after
    assert config.method.gradient_checkpointing
    optim, lora = config.optim, config.method.lora
    assert (optim.learning_rate, optim.weight_decay, optim.betas) == (4e-5, 0.01, (0.9, 0.95))
    assert (optim.eps, optim.max_grad_norm, optim.warmup_steps) == (1e-7, 1.0, 50)
    assert (lora.rank, lora.lora_alpha, lora.dropout) == (64, 128, 0.0)
    assert (config.train.global_batch_size, config.train.num_epochs) == (16, 1)
    assert settings_of(RecipeFlags(task=task, use_flash_attention=True)).precision == flash


def test_a_setting_beats_a_flag() -> None:
    config = settings_of(RecipeFlags(task="ucf101", learning_rate=1e-4), "optim.learning_rate=2e-5")
    assert config.optim.learning_rate == 2e-5


def test_fp16_becomes_fp32_where_there_is_no_gpu_and_is_said() -> None:
    translation = translate(RecipeFlags(task="ucf101"), has_gpu=False)
    assert "precision=fp32" in translation.overrides
    assert translation.notes == ("no GPU here: fp32 instead of the recipe's fp16",)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (RecipeFlags(batch_size_per_gpu=2), "packed into rows"),
        (RecipeFlags(no_tqdm=True), "on a terminal only"),
        (RecipeFlags(use_flash_attention=True), "fused wherever"),
        (RecipeFlags(task="nlvr2", full_train=True), "all training samples"),
    ],
)
def test_a_flag_that_means_nothing_any_more_is_taken_and_said(
    flags: RecipeFlags, said: str
) -> None:
    (note,) = translate(flags, has_gpu=True).notes
    assert said in note


def test_full_train_means_something_to_docvqa() -> None:
    assert translate(RecipeFlags(task="docvqa", full_train=True), has_gpu=True).notes == ()


# --- data -----------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_split(folder: Path, task: str, split: str, count: int, turns: int = 1) -> Path:
    """A file of samples, one picture each."""
    samples = []
    for number in range(count):
        name = f"{split}/{number % 4}.png"
        rest = [((), f"And {k}?", "No.") for k in range(1, turns)]
        first = ((name,), f"Is it {number}?", "Yes.")
        samples.append(make_sample(f"{split}-{number}", first, *rest))
        if not (folder / "images" / name).exists():
            write_picture(folder / "images" / name, (60, 50), number)
    write_samples(folder / f"{task}_{split}.jsonl", samples)
    return folder / f"{task}_{split}.jsonl"


def ids_of(setting: str) -> list[str]:
    return [record.sample.id for record in open_shards(setting.partition("=")[2])]


def test_a_file_is_sharded_once_and_found_again(tmp_path: Path, cache: Path) -> None:
    said: list[str] = []
    path = write_split(tmp_path / "data", "ucf101", "train", 3)
    shards = sharded(path, num_crops=4, say=said.append)
    written = (shards / "manifest.json").stat().st_mtime_ns
    assert shards.is_relative_to(cache)
    assert sharded(path, num_crops=4, say=said.append) == shards
    assert (shards / "manifest.json").stat().st_mtime_ns == written
    assert ["validating" in text for text in said] == [True, False]


def test_other_texts_or_other_pictures_are_other_shards(tmp_path: Path, cache: Path) -> None:
    path = write_split(tmp_path, "ucf101", "train", 3)
    before = sharded(path, num_crops=4)
    write_picture(tmp_path / "images" / "train" / "0.png", (70, 50), 9)
    pictures = sharded(path, num_crops=4)
    path.write_text(path.read_text().replace("Is it 2?", "Is it 3?"))
    texts = sharded(path, num_crops=4)
    assert len({before, pictures, texts}) == 3
    assert open_shards(pictures).image_sizes_wh(0) == ((70, 50),)


def test_samples_with_errors_stop_the_run_and_are_named(tmp_path: Path, cache: Path) -> None:
    path = write_split(tmp_path, "ucf101", "train", 3)
    (tmp_path / "images" / "train" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"not valid.* I101 .*`phi3v-data validate "):
        sharded(path, num_crops=4)


def test_the_evaluation_split_of_a_task_is_found(tmp_path: Path, cache: Path) -> None:
    write_split(tmp_path, "ucf101", "train", 4)
    write_split(tmp_path, "ucf101", "val", 2)
    flags = RecipeFlags(task="ucf101", data_dir=str(tmp_path))
    train, evaluated = data_overrides(flags, None, lambda text: None)
    assert (len(ids_of(train)), ids_of(evaluated)) == (4, ["val-0", "val-1"])


@pytest.mark.slow
@pytest.mark.long
def test_docvqa_trains_on_a_thousand_samples_unless_told_to_take_all(
    tmp_path: Path, cache: Path
) -> None:
    write_split(tmp_path, "docvqa", "train", 1002)
    write_split(tmp_path, "docvqa", "val", 2)
    mini = RecipeFlags(task="docvqa", data_dir=str(tmp_path))
    full = RecipeFlags(task="docvqa", data_dir=str(tmp_path), full_train=True)
    counts = [len(ids_of(data_overrides(f, None, lambda text: None)[0])) for f in (mini, full)]
    assert counts == [1000, 1002]


@pytest.mark.slow
@pytest.mark.long
def test_without_a_split_to_evaluate_on_the_first_500_are_held_out(
    tmp_path: Path, cache: Path
) -> None:
    write_split(tmp_path, "nlvr2", "train", 503, turns=2)
    said: list[str] = []
    flags = RecipeFlags(task="nlvr2", data_dir=str(tmp_path))
    train, evaluated = data_overrides(flags, None, said.append)
    assert ids_of(train) == ["train-500", "train-501", "train-502"]
    assert ids_of(evaluated) == [f"train-{n}" for n in range(500)]
    trained = open_shards(train.partition("=")[2]).sample(0)
    asked = open_shards(evaluated.partition("=")[2]).sample(0)
    assert (len(trained.conversations), len(asked.conversations)) == (2, 1)
    assert "first 500 training samples are held out" in said[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (RecipeFlags(task="ucf101"), "--task ucf101 needs --data_dir"),
        (RecipeFlags(data_dir="x"), "--data_dir needs --task: one of docvqa, "),
        (RecipeFlags(task="ucf101", data_dir="none"), "phi3v-data convert ucf101 SOURCE"),
    ],
)
def test_what_is_missing_is_said_with_the_way_out(flags: RecipeFlags, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data_overrides(flags, None, lambda text: None)


def test_a_task_needs_a_split_to_evaluate_on(tmp_path: Path, cache: Path) -> None:
    write_split(tmp_path, "docvqa", "train", 2)
    flags = RecipeFlags(task="docvqa", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"no docvqa_val.jsonl or docvqa_test.jsonl"):
        data_overrides(flags, None, lambda text: None)


# --- the model ------------------------------------------------------------------------------------


def test_a_model_is_a_folder_or_a_snapshot_in_the_cache_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--them--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--them--model" / "refs").mkdir()
    (tmp_path / "models--them--model" / "refs" / "main").write_text("abc")
    assert find_model(str(tmp_path)) == tmp_path
    assert find_model("them/model") == snapshot
    with pytest.raises(
        ValueError, match=r"them/other is no folder here.*\(`hf download them/other"
    ):
        find_model("them/other")
    with pytest.raises(ValueError, match=r"no model folder at \./models/x"):
        find_model("./models/x")


def test_a_model_that_is_named_otherwise_is_not_looked_for(tmp_path: Path, cache: Path) -> None:
    write_split(tmp_path, "ucf101", "train", 1)
    write_split(tmp_path, "ucf101", "val", 1)
    flags = RecipeFlags(task="ucf101", data_dir=str(tmp_path))
    overrides = recipe_overrides(
        flags, ["model=tiny"], has_config=False, has_gpu=False, say=lambda text: None
    )
    assert [setting for setting in overrides if setting.startswith("model=")] == ["model=tiny"]


def test_data_is_validated_for_the_crops_that_a_setting_asks_for(
    tmp_path: Path, cache: Path
) -> None:
    write_split(tmp_path, "ucf101", "train", 1)
    write_split(tmp_path, "ucf101", "val", 1)

    def train_of(num_crops: int | None, *own: str) -> str:
        flags = RecipeFlags(task="ucf101", data_dir=str(tmp_path), num_crops=num_crops)
        overrides = recipe_overrides(
            flags, ["model=tiny", *own], has_config=False, has_gpu=False, say=lambda text: None
        )
        return next(setting for setting in overrides if setting.startswith("data.train="))

    assert train_of(None, "data.num_crops=2") == train_of(2) != train_of(None)
    assert train_of(2, "data.num_crops=9", "data.num_crops=3") == train_of(3)


# --- the whole command line -----------------------------------------------------------------------


def launch(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["launch", *map(str, arguments)])


def test_an_old_command_line_trains_and_evaluates(tiny: Path, tmp_path: Path, cache: Path) -> None:
    data = tmp_path / "converted"
    write_split(data, "ucf101", "train", 4)
    write_split(data, "ucf101", "val", 2)
    flags = "--use_lora --lora_rank 4 --batch_size 4 --batch_size_per_gpu 1 --num_crops 1 --no-tqdm"
    result = launch(
        "--task", "ucf101", "--data_dir", data, "--model_name_or_path", tiny,
        "--output_dir", tmp_path / "out", *flags.split(),
        "device=cpu", "eval.max_new_tokens=2", "data.num_workers=0",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "--batch_size_per_gpu has no meaning any more" in result.output
    assert [line["step"] for line in log_lines(tmp_path / "out")] == [1]
    for when in ("before", "after"):
        summary = json.loads((tmp_path / "out" / f"eval_{when}.json").read_text())
        assert (summary["metric"], summary["num_samples"]) == ("accuracy", 2)
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()


def test_a_file_without_answers_is_evaluated_and_not_trained_on(
    tiny: Path, tmp_path: Path, cache: Path
) -> None:
    path = write_split(tmp_path, "ucf101", "test", 2)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        del row["conversations"][-1]["assistant"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["eval", "--model", tiny, "--data", path, "--num_crops", 1, "--max_new_tokens", 1]
    result = CliRunner().invoke(main, [*map(str, words), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "validating and sharding into" in result.output
    assert "2 answers; the data has none to compare them with" in result.output
    with pytest.raises(ValueError, match="the last turn has no assistant"):
        sharded(path, num_crops=1)


def test_a_file_with_all_answers_has_the_same_shards_for_training_and_evaluation(
    tmp_path: Path, cache: Path
) -> None:
    path = write_split(tmp_path, "ucf101", "val", 2)
    trained_on = sharded(path, num_crops=1)
    assert sharded(path, num_crops=1, allow_missing_answer=True) == trained_on


@pytest.mark.parametrize("spelling", ["--no-tqdm", "--no_tqdm", "--batch-size=4"])
def test_flags_are_known_in_both_spellings(spelling: str) -> None:
    result = launch(spelling, "modl=m")
    assert result.exit_code == 1
    assert "did you mean 'model'?" in result.output
