import json
import subprocess
import sys
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).resolve().parents[1] / "examples" / "quickstart.py"


def accuracy_after(out_dir: Path, *options: str) -> float:
    command = [sys.executable, str(QUICKSTART), "--out_dir", str(out_dir), *options]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "accuracy on held-out groups" in output
    return json.loads((out_dir / "eval" / "eval.json").read_text())["accuracy"]


@pytest.mark.slow
def test_the_quickstart_learns_its_classes_on_held_out_groups(tmp_path: Path) -> None:
    assert accuracy_after(tmp_path / "run") >= 0.9
