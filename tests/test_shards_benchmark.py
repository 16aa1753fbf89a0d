"""The benchmark of reading shards runs, on its smallest setting and without the peers."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "shards.py"


def run(*args: str) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *args], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_sides_read_the_same_bytes_and_an_absent_peer_is_said(tmp_path: Path):
    out = run(
        "--samples=16", "--rounds=1", "--sides=pread,raw,litdata", f"--json={tmp_path / 'x.json'}"
    )
    result = json.loads((tmp_path / "x.json").read_text())

    assert [(line["side"], line["workers"]) for line in result["sides"]][:3] == [
        ("ours", 0),
        ("pread", 0),
        ("raw", 0),
    ]
    assert all(line["gb_per_second"] > 0 for line in result["sides"])
    assert ("litdata" in result["left_out"]) == ("left out: litdata" in out)
    assert ">= 1.1" in out


def test_a_made_index_is_opened_and_read():
    out = run("--made_rows=3000", "--rounds=1")
    assert "3,000 rows" in out
    assert "first batch" in out
