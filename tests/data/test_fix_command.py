"""The options of `validate --fix`, on a command that has no others."""

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from phi3v_data.fix_command import refuse_lone_options, run_fix, with_fix_options
from phi3v_data.rules import select_rules

GOOD = '{"id": "1", "source": "s", "conversations": [{"user": "u", "assistant": "a"}]}\n'
REPAIRABLE = GOOD.replace('"1"', "2")
EMPTY = GOOD.replace('"a"', '""').replace('"1"', '"3"')


@click.command(context_settings={"token_normalize_func": lambda name: name.replace("-", "_")})
@click.argument("files", nargs=-1)
@with_fix_options
def command(files: tuple[str, ...], **options: Any) -> None:
    if not refuse_lone_options(**options):
        click.echo("validated only")
        return
    options.pop("fix")
    raise SystemExit(
        run_fix(
            files,
            **options,
            images=None,
            rules_for=lambda _: select_rules(),
            allow_missing_answer=False,
            num_crops=16,
            workers=1,
        )
    )


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "x.jsonl").write_text(GOOD + REPAIRABLE + EMPTY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, arguments)


def test_fix_says_what_it_did_and_exits_1_where_errors_are_left(root: Path):
    result = run("x.jsonl", "--fix")

    assert result.output == (
        "x.jsonl → x.fixed.jsonl: 1 line repaired (S104 1)\n  1 error left (T101 1)\n"
    )
    assert result.exit_code == 1
    assert (root / "x.fixed.jsonl").read_text() == GOOD + REPAIRABLE.replace("2", '"2"') + EMPTY


def test_unsafe_fix_names_the_lines_it_dropped_and_the_backup(root: Path):
    result = run("x.jsonl", "--unsafe-fix", "--in-place")

    assert result.output == (
        "x.jsonl → x.jsonl: 1 line repaired (S104 1), 1 line dropped (T101 1)\n"
        f"  dropped lines: {root}/x.dropped.jsonl\n  as it was: {root}/x.jsonl.bak\n"
    )
    assert result.exit_code == 0


def test_a_second_fix_finds_nothing_to_fix(root: Path):
    run("x.jsonl", "--unsafe_fix", "--in_place")

    assert run("x.jsonl", "--unsafe_fix", "--in_place").output == "x.jsonl: nothing to fix\n"


@pytest.mark.parametrize("option", [["--in_place"], ["--out_dir", "new"]])
def test_where_to_write_without_fix_is_wrong_usage(root: Path, option: list[str]):
    result = run("x.jsonl", *option)

    assert result.exit_code == 2
    assert f"{option[0]} says where --fix or --unsafe_fix writes" in result.output
    assert run("x.jsonl").output == "validated only\n"


def test_a_folder_that_cannot_be_written_is_an_error_in_words(root: Path):
    (root / "file").write_text("")
    result = run("x.jsonl", "--fix", "--out_dir", "file/below")

    assert result.exit_code == 1
    assert result.output.startswith("Error: ")


def test_names_of_files_cannot_write_to_the_terminal(root: Path):
    (root / "x\x1b[2J.jsonl").write_text(GOOD)

    assert "\x1b" not in run("x\x1b[2J.jsonl", "--fix").output
