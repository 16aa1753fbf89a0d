"""Every block of the page on validation, run on the file that the page shows."""

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from phi3v_data.cli import main
from phi3v_data.rules.rule import Rule
from phi3v_data.schema import Sample
from phi3v_data.validate_config import ValidateConfig, load_config
from PIL import Image

PAGE = (Path(__file__).resolve().parents[1] / "docs/validation.md").read_text()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS: list[tuple[str, str]] = FENCE.findall(PAGE)


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "images/cat.jpg")
    (lines,) = blocks("jsonl")
    (tmp_path / "train.jsonl").write_text(lines)
    (tmp_path / "val.jsonl").write_text(lines.splitlines()[0] + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def run(command: str) -> str:
    words = shlex.split(command)
    assert words[0] == "phi3v-data", command
    result = CliRunner().invoke(main, words[1:])
    assert result.exit_code in (0, 1), f"{command}\n{result.output}"
    assert not isinstance(result.exception, Exception)
    return result.stdout


def test_every_command_and_what_it_prints():
    printed = ""
    num_compared = 0
    for kind, text in BLOCKS:
        if kind == "sh":
            printed = "".join(run(line) for line in text.splitlines())
        elif kind == "text":
            # A table's lines end in spaces, which no page keeps.
            assert [line.rstrip() for line in printed.splitlines()] == text.splitlines()
            num_compared += 1
        elif kind == "json":
            assert_part_of(json.loads(text), json.loads(printed))
            num_compared += 1

    assert num_compared == 5


def assert_part_of(part: Any, whole: Any) -> None:
    """All of `part` is in `whole`; lists are compared from their start."""
    if isinstance(part, dict):
        for key, value in part.items():
            assert_part_of(value, whole[key])
    elif isinstance(part, list):
        assert len(part) <= len(whole)
        for one, other in zip(part, whole, strict=False):
            assert_part_of(one, other)
    else:
        assert part == whole


def test_the_settings_are_taken_and_are_all_there_are(folder: Path):
    text = blocks("toml")[0]
    (folder / "pyproject.toml").write_text(text)
    config = load_config(folder)
    table = tomllib.loads(text)["tool"]["phi3v-data"]["validate"]

    assert config.rules_for("a_test.jsonl")
    assert config.max_errors == 1000
    assert {key.replace("-", "_") for key in table} == set(ValidateConfig.model_fields) - {"root"}
    assert run("phi3v-data validate train.jsonl").startswith("train.jsonl:2:96: S103")


def test_the_rule_of_the_page_works_as_it_stands():
    (code,) = blocks("python")
    names: dict[str, Any] = {}
    exec(code, names)
    (rule,) = names["RULES"]
    line = blocks("jsonl")[0].splitlines()[0].replace("A cat", "A CAT")
    (finding,) = rule.check(Sample.from_json(line), None)

    assert isinstance(rule, Rule)
    assert rule.summary == "An answer is in capitals."
    assert finding.pointer == "/conversations/0/assistant"
