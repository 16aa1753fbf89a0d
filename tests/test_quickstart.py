import json
import subprocess
import sys
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).resolve().parents[1] / "examples" / "quickstart.py"


@pytest.mark.slow
def test_the_quickstart_runs_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, str(QUICKSTART), "--out_dir", str(out), "--num_epochs", "1"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "accuracy on held-out groups" in output
    assert json.loads((out / "eval" / "eval.json").read_text())["num_samples"] == 60
