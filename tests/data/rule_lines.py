"""What the tests of rules share: a file of given lines, and what is said about each."""

import json
from pathlib import Path
from typing import Any

from phi3v_data.checked_lines import check
from phi3v_data.diagnostics import Diagnostic


def turn(**fields: Any) -> dict[str, Any]:
    """A good sample of one turn, changed."""
    return {
        "id": "a",
        "source": "toy",
        "conversations": [{"user": "What?", "assistant": "Red", **fields}],
    }


def find(folder: Path, *lines: bytes | dict[str, Any]) -> list[Diagnostic]:
    """Diagnostics of a file of the given lines (bytes, or an object to dump)."""
    content = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
    (folder / "x.jsonl").write_bytes(b"\n".join(content) + b"\n")
    return [d for c in check([folder / "x.jsonl"]) for d in c.diagnostics]


def only(diagnostics: list[Diagnostic], code: str) -> Diagnostic:
    assert [d.code for d in diagnostics] == [code], diagnostics
    return diagnostics[0]
