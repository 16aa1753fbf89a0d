import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from phi3v_train.runlog import Line, RankLine, RunLog, check_log, open_sinks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.train.builders import toy_config

LINE = Line(
    step=10,
    num_steps=120,
    epoch=0.5,
    loss=3.14159,
    learning_rate=2e-4,
    grad_norm=1.2,
    label_tokens=1024,
    tokens_per_second=9876.4,
    images_per_second=12.34,
    data_wait=0.013,
    memory_gib=36.2,
    mfu=0.456,
    eta_seconds=190.0,
    seconds=17.0,
)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def open_log(folder: Path, **settings: Any) -> RunLog:
    return RunLog(folder, **{"is_main": True, "num_steps": 120, "start": 0, **settings})


class Kept:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.found: list[tuple[int, dict[str, float]]] = []

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.found.append((step, dict(values)))

    def close(self) -> None:
        self.found.append((-1, {}))


def test_a_line_says_all_that_matters_on_one_line() -> None:
    assert str(LINE) == (
        "step  10/120  loss 3.1416  lr 2.00e-04  grad 1.20  1,024 label tok  9,876 tok/s  "
        "12.3 img/s  wait 1%  36.2 GiB  MFU 45.6%  ETA 3m10s"
    )
    assert "MFU" not in str(replace(LINE, mfu=None))


def test_a_line_is_printed_kept_and_handed_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = Kept()
    with open_log(tmp_path, sinks=(kept,)) as log:
        log.line(LINE)
        log.scores(10, {"loss": 2.5, "accuracy": 0.75})
    assert capsys.readouterr().out == f"{LINE}\n"
    assert lines_of(tmp_path / "log.jsonl") == [asdict(LINE)]
    (step, values), scores = kept.found
    assert (step, values["train/loss"], values["train/mfu"]) == (10, 3.14159, 0.456)
    assert scores == (10, {"eval/loss": 2.5, "eval/accuracy": 0.75})


def test_what_is_no_number_is_null_so_that_every_line_is_json(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.line(replace(LINE, grad_norm=math.inf, mfu=None))
    text = (tmp_path / "log.jsonl").read_text()
    assert "Infinity" not in text
    assert json.loads(text)["grad_norm"] is None


def test_going_on_drops_what_came_after_the_checkpoint_and_a_cut_off_line(tmp_path: Path) -> None:
    with open_log(tmp_path, rank=0) as log:
        for step in (10, 20, 30):
            log.line(replace(LINE, step=step))
            log.rank_line(RankLine(step, 1, 2, 300, 4, 0.1, 1.0, 9.0))
    for path in (tmp_path / "log.jsonl", tmp_path / "logs" / "rank-0.jsonl"):
        with open(path, "a") as file:
            file.write('{"step": 4')
    with open_log(tmp_path, start=20, rank=0) as log:
        log.line(replace(LINE, step=30, loss=1.0))
    found = [(line["step"], line["loss"]) for line in lines_of(tmp_path / "log.jsonl")]
    assert found == [(10, 3.14159), (20, 3.14159), (30, 1.0)]
    ranks = lines_of(tmp_path / "logs" / "rank-0.jsonl")
    assert [line["step"] for line in ranks] == [10, 20]


def test_other_ranks_are_silent_and_write_their_own_file_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_log(tmp_path, is_main=False, rank=3) as log:
        log.line(LINE)
        log.say("nothing")
        log.rank_line(RankLine(10, 1, 2, 300, 4, 0.1, 1.0, 9.0))
    assert capsys.readouterr().out == ""
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.jsonl")] == [
        "logs/rank-3.jsonl"
    ]
    assert lines_of(tmp_path / "logs" / "rank-3.jsonl")[0]["num_tokens"] == 300


def test_tensorboard_gets_the_numbers_and_forgets_what_came_after_a_checkpoint(
    tmp_path: Path,
) -> None:
    config = toy_config(Path("m"), Path("s"), tmp_path, "log.tensorboard=true")
    for start, loss in ((0, 3.0), (10, 1.0)):
        sinks = open_sinks(config, start=start)
        with open_log(tmp_path, start=start, sinks=sinks) as log:
            for step in range(start + 10, 40, 10):
                log.line(replace(LINE, step=step, loss=loss))
        for sink in sinks:
            sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(10, 3.0), (20, 1.0), (30, 1.0)]
    assert {"train/learning_rate", "train/tokens_per_second"} <= set(events.Tags()["scalars"])


def test_no_sink_is_opened_that_is_not_asked_for(tmp_path: Path) -> None:
    assert open_sinks(toy_config(Path("m"), Path("s"), tmp_path), start=0) == []


def test_wandb_that_is_not_installed_is_said_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if not installed
    config = toy_config(Path("m"), Path("s"), tmp_path, "log.wandb=project")
    with pytest.raises(ValueError, match=r"phi3v-train\[wandb\]"):
        check_log(config)


def test_wandb_offline_keeps_the_numbers_and_a_run_that_goes_on_keeps_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="needs the extra phi3v-train[wandb]")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    config = toy_config(Path("m"), Path("s"), tmp_path, "log.wandb=project")
    for start in (0, 10):
        (sink,) = open_sinks(config, start=start)
        with open_log(tmp_path, start=start, sinks=(sink,)) as log:
            log.line(replace(LINE, step=start + 10, loss=1.25))
        sink.close()
    files = sorted((tmp_path / "logs" / "wandb").glob("offline-run-*/run-*.wandb"))
    run_id = (tmp_path / "logs" / "wandb-id").read_text().strip()
    assert {file.name for file in files} == {f"run-{run_id}.wandb"}
    kept = b"".join(file.read_bytes() for file in files)
    for part in (b"project", b"train/loss", b"1.25"):
        assert part in kept
