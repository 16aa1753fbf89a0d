"""Toy annotation files and pictures, and what a conversion of them gave."""

import json
from pathlib import Path
from typing import Any

import phi3v_data
from phi3v_data.convert import ConversionResult
from PIL import Image


def write_image(path: Path, color: int = 0, kind: str = "PNG") -> Path:
    """A small picture; each colour number gives another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 12), (color % 256, color // 256 % 256, 90)).save(path, kind)
    return path


def write_lines(path: Path, *rows: dict[str, Any] | bytes) -> Path:
    """JSON lines; bytes are written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def rejections(result: ConversionResult) -> list[tuple[str, str]]:
    """(reason, detail) of everything that was rejected."""
    assert result.rejected_file is not None
    lines = result.rejected_file.read_text().splitlines()
    return [(entry["reason"], entry["detail"]) for entry in map(json.loads, lines)]


def assert_valid(result: ConversionResult, *, allow_missing_answer: bool = False) -> None:
    """The validator finds no error in what came out."""
    for path in result.files.values():
        report = phi3v_data.validate([path], allow_missing_answer=allow_missing_answer)
        assert not [d for d in report.diagnostics if d.severity == "error"], report.diagnostics


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def touch(root: Path, *names: str) -> Path:
    """Empty files."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root
