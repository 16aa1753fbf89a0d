"""docs/hardware.md: its commands run, and its figures are what they print."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from phi3v_train.cli import main
from phi3v_train.config import load_config
from phi3v_train.estimate import GIB
from phi3v_train.launch import check_crew

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "hardware.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [shlex.split(line, comments=True)[1:] for block in BLOCKS for line in block.splitlines()]


def run(words: list[str]) -> Result:
    return CliRunner().invoke(main, words)


@pytest.mark.parametrize("words", [w for w in COMMANDS if w[0] == "estimate"], ids=shlex.join)
def test_what_is_estimated_fits_and_the_command_shown_then_is_one_that_can_be_run(
    words: list[str],
) -> None:
    done = run(words)
    assert done.exit_code == 0, done.output
    shown = shlex.split(done.output.splitlines()[-1])
    assert shown[:2] == ["phi3v-train", "launch"]
    settings = [word for word in shown[2:] if "=" in word]
    options = dict(zip(shown[2 + len(settings) :: 2], shown[3 + len(settings) :: 2], strict=True))
    num_nodes = int(options.get("--nnodes", 1))
    meeting: dict[str, Any] = {}
    if num_nodes > 1:
        assert (options["--node_rank"], options["--rdzv_endpoint"]) == ("NODE", "HOST:PORT")
        meeting = {"node_rank": 1, "rdzv_endpoint": "host0:29400"}
    crew = check_crew(
        load_config(None, settings),
        {},
        nproc=int(options["--nproc"]),
        nnodes=num_nodes,
        **meeting,
    )
    assert crew is not None


def test_the_doctor_and_the_bench_run_here() -> None:
    torch.set_num_threads(1)
    (doctor,) = (words for words in COMMANDS if words[0] == "doctor")
    assert re.search(r"^python +3\.\d+", run(doctor).output, re.MULTILINE)
    (bench,) = (words for words in COMMANDS if words[0] == "bench")
    done = run(bench)
    assert done.exit_code == 0, done.output
    assert "(median of 2;" in done.output


def test_the_table_beside_the_cookbooks_figures_is_what_the_command_above_it_prints() -> None:
    (words,) = (words for words in COMMANDS if "--as_is" in words)
    printed: dict[tuple[str, str], tuple[str, str]] = {}
    for line in run(words).output.splitlines():
        cells = re.split(r" {2,}", line)
        if len(cells) == 11 and cells[0] != "method":
            printed[cells[0], cells[1]] = cells[7], cells[9]
    rows = re.findall(
        r"^\| (.+) \| (\w+) \| ([\d.]+) \(([\d.]+)\) \| ~\d+ \| ([\d.]+) \| [\d.]+ \|$",
        PAGE,
        re.MULTILINE,
    )
    assert len(rows) == 3
    for method, engine, gib, gigabytes, images_per_second in rows:
        assert (gib, images_per_second) == printed[method, engine]
        assert float(gigabytes) == pytest.approx(float(gib) * GIB / 1e9, abs=0.1)
