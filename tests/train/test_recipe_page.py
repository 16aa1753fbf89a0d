"""docs/from-the-recipe.md, followed: its first command lines in one folder, stopped on the way."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from phi3v_data.cli import main as phi3v_data
from phi3v_train.cli import main as phi3v_train
from phi3v_train.recipe_flags import TASKS, RecipeFlags

from tests.data.clips import write_clip
from tests.train.builders import log_lines

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "from-the-recipe.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
PROGRAMS = {"phi3v-data": phi3v_data, "phi3v-train": phi3v_train}


def run(line: str) -> str:
    program, *words = shlex.split(line)
    result = CliRunner().invoke(PROGRAMS[program], words)
    assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"
    return result.output


def stop_on_the_way(line: str, seconds: float) -> int:
    """Start a command in a process, press Ctrl-C after its second step; its exit status."""
    words = shlex.split(line)
    process = subprocess.Popen([sys.executable, "-m", "phi3v_train.cli", *words[1:]])
    log, end = Path("output/log.jsonl"), time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if log.exists() and len(log.read_text().splitlines()) >= 2:
            process.send_signal(signal.SIGINT)
            return process.wait(timeout=seconds)
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"no second step in {seconds} s, or an end before it")


@pytest.mark.slow
def test_the_page_leads_from_clips_to_a_resumed_evaluated_merged_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for split in ("train", "val"):
        for name in ("Archery", "Biking"):
            for number in range(5 if split == "train" else 1):
                write_clip(
                    tmp_path / "clips" / split / name / f"v_{name}_g0{number}_c01.avi",
                    num_frames=10, seed=number,
                )  # fmt: skip
    convert, init, launch = BLOCKS[0].splitlines()
    run(convert)
    run(init)
    launch += " device=cpu data.num_workers=0 eval.max_new_tokens=2 train.log_every=1"
    launch += " train.num_epochs=4"  # 20 steps: room to stop in
    assert stop_on_the_way(launch, seconds=300) == 128 + signal.SIGINT
    done = json.loads(Path("output/log.jsonl").read_text().splitlines()[-1])["step"]
    assert "going on from" in run(launch)
    assert [line["step"] for line in log_lines(Path("output"))] == list(range(1, 21))
    assert 2 <= done < 20

    evaluate, merge, again, report = BLOCKS[1].splitlines()
    quick = " --device cpu --max_new_tokens 2"
    assert "read again and found equal" in run(merge)
    for line in (evaluate, again):
        assert re.search(r"accuracy 0\.\d+ \(\d of 2\)", run(line + quick))
    assert len(Path("output/eval_val/predictions.jsonl").read_text().splitlines()) == 2
    cached = {path.name.rpartition("-")[0] for path in Path("cache/phi3v-train/shards").iterdir()}
    assert cached >= {"ucf101_train", "ucf101_val"}
    Path("output/report.html").unlink()
    run(report)
    assert os.path.getsize("output/report.html") > 10_000


def test_the_page_names_every_task_and_every_flag() -> None:
    for task in TASKS:
        assert f"finetune_hf_trainer_{task}.py" in PAGE
    flags = {name for name in RecipeFlags.__dataclass_fields__ if name != "task"}
    table = PAGE.split("## Flags")[1].split("## Data")[0]
    named = set(re.findall(r"`--([\w-]+)`", table))
    assert {name.replace("-", "_") for name in named} >= flags
