"""A model's files, written without DeepSpeed."""

import sys
from pathlib import Path

import pytest
import torch
from phi3v_train.methods import load_model, move
from phi3v_train.model_files import write_model_files


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_they_are_those_of_save_pretrained_byte_for_byte(tiny: Path, tmp_path: Path) -> None:
    model = load_model(tiny)
    move(model, torch.bfloat16)
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    write_model_files(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    assert len(contents(tmp_path / "ours")) == 3


def test_writing_them_imports_no_deepspeed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That it is installed is enough for transformers to import it."""
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    write_model_files(load_model(tiny), tmp_path)
    assert "deepspeed" not in sys.modules
