import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from phi3v_train.checkpoint import (
    CheckpointError,
    RunState,
    check_same_run,
    checkpoint_folder,
    latest_checkpoint,
    load_checkpoint,
    model_hash,
    read_state,
    save_checkpoint,
)
from phi3v_train.engine import World
from phi3v_train.plan import PlanSettings
from torch import nn

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


def toy_training() -> tuple[nn.Linear, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(output_dir: Path, step: int, keep: int = 2) -> Path:
    model, optimizer = toy_training()
    return save_checkpoint(
        output_dir,
        replace(STATE, step=step),
        dict(model.named_parameters()),
        model,
        optimizer,
        {},
        WORLD,
        keep=keep,
    )


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    load_checkpoint(path, dict(model.named_parameters()), model, optimizer, scaler, WORLD)


def test_weights_and_moments_come_back_as_they_were(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    model, optimizer = toy_training()
    expected = [p.detach().clone() for p in model.parameters()]
    other = nn.Linear(3, 2)
    fresh = torch.optim.AdamW(other.parameters(), lr=0.1)
    load(path, other, fresh)
    for parameter, value in zip(other.parameters(), expected, strict=True):
        assert torch.equal(parameter, value)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[mine][name], fresh.state[theirs][name])


def test_latest_names_the_newest_and_older_ones_go(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step in (2, 4, 6):
        path = save(tmp_path, step)
        assert latest_checkpoint(tmp_path) == path
    folders = sorted(p.name for p in checkpoint_folder(tmp_path).iterdir())
    assert folders == ["latest", "step-00000004", "step-00000006"]


def test_what_a_killed_attempt_left_half_written_is_neither_used_nor_in_the_way(
    tmp_path: Path,
) -> None:
    path = save(tmp_path, 2)
    half = checkpoint_folder(tmp_path) / "step-00000004.tmp"
    half.mkdir()
    (half / "rubbish").touch()
    assert latest_checkpoint(tmp_path) == path
    assert not (save(tmp_path, 4) / "rubbish").exists()


def test_a_state_is_read_back_equal(tmp_path: Path) -> None:
    assert read_state(save(tmp_path, 2)) == STATE


def error_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_state(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    assert "is not a checkpoint: it has no state.json" in error_of(tmp_path)
    save(tmp_path, 2)
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


def test_a_cut_off_weight_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    (file,) = path.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(path, *toy_training())


@pytest.mark.parametrize("content", [None, b"", b"junk"])
def test_a_list_of_contents_that_is_lost_or_damaged_is_refused(
    tmp_path: Path, content: bytes | None
) -> None:
    path = save(tmp_path, 2)
    (path / ".metadata").unlink()
    if content is not None:
        (path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        load(path, *toy_training())
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
