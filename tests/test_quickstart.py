import json
import subprocess
import sys
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).resolve().parents[1] / "examples" / "quickstart.py"


def held_out_accuracy(out_dir: Path, *options: str) -> float:
    """Of the trained model on groups it has not seen; chance is 0.25, colour alone gives 0.5."""
    command = [sys.executable, str(QUICKSTART), "--out_dir", str(out_dir), *options]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "accuracy on held-out clips" in output
    result = json.loads((out_dir / "eval" / "eval.json").read_text())
    assert result["num_samples"] == 60
    return result["accuracy"]


@pytest.mark.slow
def test_the_quickstart_learns_its_classes_on_held_out_groups(tmp_path: Path) -> None:
    assert held_out_accuracy(tmp_path / "run") >= 0.9


@pytest.mark.slow
@pytest.mark.long
def test_one_frame_does_not_separate_the_classes(tmp_path: Path) -> None:
    assert held_out_accuracy(tmp_path / "run", "--num_frames", "1") <= 0.6


@pytest.mark.slow
@pytest.mark.long
def test_shuffled_labels_stay_at_chance(tmp_path: Path) -> None:
    # Three standard deviations of 60 guesses at 0.25.
    assert held_out_accuracy(tmp_path / "run", "--shuffle_labels") <= 0.25 + 3 * 0.056
