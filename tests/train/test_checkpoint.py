import json
import resource
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from phi3v_train.checkpoint import (
    CheckpointError,
    RunState,
    best_checkpoint,
    best_score,
    check_same_run,
    checkpoint_folder,
    latest_checkpoint,
    load_checkpoint,
    model_hash,
    read_state,
    save_checkpoint,
    settle,
)
from phi3v_train.config import CheckpointConfig, MethodConfig
from phi3v_train.engine import World
from phi3v_train.methods import TrainingModel, load_to_train
from phi3v_train.plan import PlanSettings
from phi3v_train.replicated_engine import ReplicatedEngine
from phi3v_train.retention import Keep, Score
from phi3v_train.trained_weights import read_trained
from phi3v_train.trainer import train
from torch import Tensor, nn

from tests.train.builders import toy_config
from tests.train.kills import Moment, run

PLAN = PlanSettings(
    dataset_fingerprint="d",
    tokenizer_hash="t",
    num_crops=1,
    max_tokens_per_row=800,
    seed=3,
    global_batch_size=4,
)
STATE = RunState(step=2, plan=PLAN, maths={"optim.learning_rate": 1e-3}, model_hash="m")
WORLD = World(0, 1, torch.device("cpu"))
PROJECTOR = MethodConfig(freeze=("vision", "llm"))


def adam(trainable: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable.values(), lr=0.1)


def toy_engine(tiny: Path, num_steps: int = 0) -> ReplicatedEngine:
    """The tiny model whose projector trains, after steps with made-up gradients."""
    engine = ReplicatedEngine(
        load_to_train(tiny, PROJECTOR, "fp32"), WORLD, adam, max_grad_norm=1.0
    )
    torch.manual_seed(0)
    for _ in range(num_steps):
        for parameter in engine.training.trainable.values():
            parameter.grad = torch.randn_like(parameter)
        engine.step()
    return engine


@pytest.fixture(scope="module")
def engine(tiny: Path) -> ReplicatedEngine:
    """One that has taken a step; tests save it, and change nothing."""
    return toy_engine(tiny, 1)


NEWEST = Keep()


def save(
    output_dir: Path,
    engine: ReplicatedEngine,
    step: int = 2,
    keep: Keep = NEWEST,
    score: Score | None = None,
) -> Path:
    return save_checkpoint(output_dir, replace(STATE, step=step, score=score), engine, WORLD, keep)


def weights_of(training: TrainingModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in training.trainable.items()}


def folders(output_dir: Path) -> list[str]:
    return sorted(path.name for path in checkpoint_folder(output_dir).iterdir())


def test_weights_and_moments_come_back_as_they_were(
    tiny: Path, engine: ReplicatedEngine, tmp_path: Path
) -> None:
    path = save(tmp_path, engine)
    fresh = toy_engine(tiny)
    load_checkpoint(path, fresh)
    places = fresh.training.trainable
    assert len(places) == 6
    for name, mine in engine.training.trainable.items():
        assert torch.equal(mine, places[name])
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            found = fresh.optimizer.state[places[name]][moment]
            assert torch.equal(engine.optimizer.state[mine][moment], found)


def test_weights_are_read_without_a_model_too(engine: ReplicatedEngine, tmp_path: Path) -> None:
    found = read_trained(save(tmp_path, engine))
    expected = weights_of(engine.training)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_latest_names_the_newest_and_older_ones_go(
    engine: ReplicatedEngine, tmp_path: Path
) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step in (2, 4, 6):
        path = save(tmp_path, engine, step)
        assert latest_checkpoint(tmp_path) == path
    assert folders(tmp_path) == ["latest", "step-00000004", "step-00000006"]


def test_best_names_the_one_with_the_best_score_which_stays(
    engine: ReplicatedEngine, tmp_path: Path
) -> None:
    assert best_checkpoint(tmp_path) is None
    assert best_score(tmp_path) is None
    keep = Keep(newest=1, best=1, every_steps=8)
    for step, value in ((2, 0.5), (4, 0.9), (6, 0.7), (8, None), (10, 0.6), (12, None)):
        score = None if value is None else Score("accuracy", value, higher_is_better=True)
        save(tmp_path, engine, step, keep, score)
    best = best_checkpoint(tmp_path)
    assert best is not None
    assert best.name == "step-00000004"
    assert best_score(tmp_path) == Score("accuracy", 0.9, higher_is_better=True)
    stay = ["best", "latest", "step-00000004", "step-00000008", "step-00000012"]
    assert folders(tmp_path) == stay
    settle(tmp_path, keep)
    assert folders(tmp_path) == stay


def test_what_a_killed_attempt_left_half_written_is_neither_used_nor_in_the_way(
    engine: ReplicatedEngine, tmp_path: Path
) -> None:
    path = save(tmp_path, engine)
    half = checkpoint_folder(tmp_path) / "step-00000004.tmp"
    half.mkdir()
    (half / "rubbish").touch()
    assert latest_checkpoint(tmp_path) == path
    settle(tmp_path, Keep())
    assert not half.exists()
    half.mkdir()
    (half / "rubbish").touch()
    assert not (save(tmp_path, engine, 4) / "rubbish").exists()


def test_a_checkpoint_that_cannot_be_read_is_left_where_it_is(
    engine: ReplicatedEngine, tmp_path: Path
) -> None:
    other = checkpoint_folder(tmp_path) / "step-00000001"
    other.mkdir(parents=True)
    (other / "state.json").write_text('{"format_version": 99}')
    for step in (2, 4):
        save(tmp_path, engine, step, Keep(newest=1))
    assert folders(tmp_path) == ["latest", "step-00000001", "step-00000004"]


# --- when -----------------------------------------------------------------------------------------


def test_a_checkpoint_is_due_after_so_many_steps_or_so_many_minutes() -> None:
    by_steps, by_time = CheckpointConfig(every_steps=3), CheckpointConfig(every_minutes=2)
    assert [done for done in range(1, 8) if by_steps.is_due(done, 1e9)] == [3, 6]
    assert [seconds for seconds in (0, 119.9, 120, 500) if by_time.is_due(1, seconds)] == [120, 500]
    both = CheckpointConfig(every_steps=3, every_minutes=2)
    assert [both.is_due(*now) for now in ((1, 0), (3, 0), (1, 120))] == [False, True, True]
    assert not CheckpointConfig().is_due(3, 1e9)


@pytest.mark.parametrize(("minutes", "saved"), [(1e-6, [1, 2, 3]), (60, [3])])
def test_a_run_saves_when_its_minutes_are_over_and_at_its_end(
    tiny: Path, toy_shards: Path, tmp_path: Path, minutes: float, saved: list[int]
) -> None:
    often = (f"checkpoint.every_minutes={minutes:f}", "checkpoint.keep=9", "train.max_steps=3")
    train(toy_config(tiny, toy_shards, tmp_path, *often, "method.freeze=[vision, llm]"))
    assert folders(tmp_path) == ["latest", *(f"step-{step:08d}" for step in saved)]


# --- killed at any moment -------------------------------------------------------------------------


class Number:
    """The smallest engine that can be saved: it knows one number, in two files."""

    state_format = "number"

    def __init__(self, value: int) -> None:
        self.value = value

    def save(self, folder: Path) -> None:
        for name in ("a", "b"):
            (folder / name).write_text(str(self.value))

    def load(self, folder: Path) -> None:
        (self.value,) = {int((folder / name).read_text()) for name in ("a", "b")}


def test_a_save_killed_before_any_of_its_changes_leaves_the_old_checkpoint_or_the_new_one(
    tmp_path: Path,
) -> None:
    """Every moment at which the disk is different is tried; then the next attempt goes on."""
    keep = Keep(newest=1, best=1)

    def save_number(output: Path, step: int) -> Path:
        score = Score("loss", 9.0 - step, higher_is_better=False)
        state = replace(STATE, step=step, state_format="number", score=score)
        return save_checkpoint(output, state, Number(step), WORLD, keep)

    event, left_behind, was_killed = 0, set[str](), True
    while was_killed:
        output = tmp_path / str(event)
        save_number(output, 2)
        was_killed = run(partial(save_number, output, 4), Moment(change=event)).was_killed
        for found in (latest_checkpoint(output), best_checkpoint(output)):
            assert found is not None
            number = Number(0)
            load_checkpoint(found, number)
            assert number.value == read_state(found).step
            left_behind.add(found.name)
        settle(output, keep)
        assert save_number(output, 4) == latest_checkpoint(output) == best_checkpoint(output)
        assert folders(output) == ["best", "latest", "step-00000004"]
        event += 1
    assert left_behind == {"step-00000002", "step-00000004"}
    assert event > 15


def test_a_disk_that_is_full_is_one_line_and_leaves_the_older_checkpoint(
    tiny: Path, engine: ReplicatedEngine, tmp_path: Path
) -> None:
    path = save(tmp_path, engine)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # no file may grow beyond this
    try:
        with pytest.raises(
            CheckpointError, match=r"step-00000004\.tmp cannot be written: "
        ) as caught:
            save(tmp_path, engine, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert latest_checkpoint(tmp_path) == path
    load_checkpoint(path, toy_engine(tiny))


# --- what can't be used ---------------------------------------------------------------------------


def test_a_state_is_read_back_equal(engine: ReplicatedEngine, tmp_path: Path) -> None:
    assert read_state(save(tmp_path / "a", engine)) == STATE
    score = Score("anls", 0.25, higher_is_better=True)
    assert read_state(save(tmp_path / "b", engine, score=score)) == replace(STATE, score=score)


def test_a_state_of_the_first_release_is_read(tmp_path: Path) -> None:
    content = json.loads(STATE.to_json())
    del content["score"], content["state_format"]
    (tmp_path / "state.json").write_text(json.dumps(content))
    assert read_state(tmp_path) == STATE


def error_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_state(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_that_is_no_checkpoint_is_refused(
    engine: ReplicatedEngine, tmp_path: Path
) -> None:
    assert "is not a checkpoint: it has no state.json" in error_of(tmp_path)
    save(tmp_path, engine)
    (checkpoint_folder(tmp_path) / "latest").write_text("step-00000009\n")
    with pytest.raises(CheckpointError, match="names step-00000009, which is not a checkpoint"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format_version": 1}'])
def test_a_damaged_state_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content)
    assert "state.json is damaged: " in error_of(tmp_path)


def test_another_format_version_is_refused_with_the_way_out(tmp_path: Path) -> None:
    content = json.loads(STATE.to_json())
    (tmp_path / "state.json").write_text(json.dumps({**content, "format_version": 99}))
    message = error_of(tmp_path)
    assert "has checkpoint format 99, this program reads 1" in message
    assert "the release that wrote it" in message


def test_files_of_another_engine_are_refused_with_the_engines_that_read_them(
    engine: ReplicatedEngine, tmp_path: Path
) -> None:
    path = save(tmp_path, engine)
    content = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**content, "state_format": "deepspeed"}))
    with pytest.raises(CheckpointError, match=r"format deepspeed.* reads dcp; .*zero1, zero2"):
        load_checkpoint(path, engine)
    with pytest.raises(CheckpointError, match="only dcp is read here; let the run come to its end"):
        read_trained(path)


def test_a_cut_off_weight_file_is_refused(
    tiny: Path, engine: ReplicatedEngine, tmp_path: Path
) -> None:
    path = save(tmp_path, engine)
    (file,) = path.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(path, toy_engine(tiny))
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_trained(path)


@pytest.mark.parametrize("content", [None, b"", b"junk"])
def test_a_list_of_contents_that_is_lost_or_damaged_is_refused(
    tiny: Path, engine: ReplicatedEngine, tmp_path: Path, content: bytes | None
) -> None:
    path = save(tmp_path, engine)
    (path / ".metadata").unlink()
    if content is not None:
        (path / ".metadata").write_bytes(content)
    readers: list[Callable[[Path], object]] = [
        lambda path: load_checkpoint(path, toy_engine(tiny)),
        read_trained,
    ]
    for read in readers:
        with pytest.raises(ValueError, match="cannot be read") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_every_field_that_changed_is_named_old_and_new(tmp_path: Path) -> None:
    now = RunState(
        step=2,
        plan=replace(PLAN, seed=4, num_crops=16),
        maths={"optim.learning_rate": 2e-3},
        model_hash="other",
    )
    check_same_run(tmp_path, STATE, STATE)
    with pytest.raises(CheckpointError) as caught:
        check_same_run(tmp_path, STATE, now)
    for part in (
        "seed: 3 -> 4",
        "num_crops: 1 -> 16",
        "optim.learning_rate: 0.001 -> 0.002",
        "weights of the model: m -> other",
        "--overwrite",
    ):
        assert part in str(caught.value)


def test_the_hash_of_a_model_follows_its_weights(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    assert model_hash(tmp_path) == model_hash(tiny)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert model_hash(tmp_path) != model_hash(tiny)
