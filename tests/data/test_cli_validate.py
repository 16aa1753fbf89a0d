import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from phi3v_data import Sample, Turn, write_samples
from phi3v_data.cli import main
from PIL import Image


def sample(id: str, *images: str, answer: str | None = "a") -> Sample:
    turns = (Turn(images=images, user="u", assistant=answer),)
    return Sample(id=id, source="toy", conversations=turns)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "a.png")
    write_samples(tmp_path / "good.jsonl", [sample("1", "a.png"), sample("2")])
    write_samples(tmp_path / "bad.jsonl", [sample("1", "a.png"), sample("2", answer=" ")])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def run(*arguments: str, **env: str) -> Result:
    return CliRunner().invoke(main, arguments, env=env)


def test_a_clean_file_exits_0_and_says_so():
    result = run("validate", "good.jsonl")

    assert result.exit_code == 0
    assert result.output == "no errors: 2 of 2 samples valid (1 image looked at)\n"


def test_errors_exit_1_with_place_code_message_and_summary():
    result = run("validate", "bad.jsonl", "good.jsonl")

    assert result.exit_code == 1
    assert result.output.startswith("bad.jsonl:2:79: error T101 the answer is empty\n  |\n2 | …")
    assert "  = at: /conversations/0/assistant of sample '2'\n" in result.output
    assert "  = help: leave 'assistant' out" in result.output
    assert re.search(r"T101 +error +empty-answer +1", result.output)
    assert result.output.endswith("1 error, 2 warnings: 3 of 4 samples valid (1 image looked at)\n")
    assert result.stderr == ""


def test_unused_lists_image_files_that_no_sample_names(root: Path):
    Image.new("RGB", (9, 9)).save(root / "images" / "left_over.png")
    result = run("validate", "good.jsonl", "--unused", "--format", "concise")

    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "good.jsonl: I110 no sample names 1 image file under 'images': 'left_over.png'",
        "no errors, 1 warning: 2 of 2 samples valid (1 image looked at)",
    ]
    assert "I110" not in run("validate", "good.jsonl").output


def test_a_cache_that_cannot_be_used_is_a_warning_on_the_error_stream(root: Path):
    result = run("validate", "good.jsonl", XDG_CACHE_HOME=str(root / "good.jsonl"))

    assert result.exit_code == 0
    assert result.stdout.startswith("no errors: 2 of 2 samples valid")
    assert result.stderr.startswith("warning: no cache at ")
    assert result.stderr.count("\n") == 1
    assert run("validate", "good.jsonl", "--no_cache").stderr == ""


def test_the_output_is_coloured_on_a_terminal_only():
    assert "\x1b[" not in run("validate", "bad.jsonl").output
    assert "\x1b[1;31m" in run("validate", "bad.jsonl", FORCE_COLOR="1", TERM="xterm").output
    plain = run("validate", "bad.jsonl", FORCE_COLOR="1", TERM="xterm", NO_COLOR="1").output
    assert "\x1b" not in plain


def test_data_cannot_write_control_characters_to_the_terminal(root: Path):
    bad = sample("x\x1b[2Jy\u202e", "no\x1b]0;x\x07.png", answer=" ")
    write_samples(root / "bad.jsonl", [bad, sample("2", "a.png")])
    output = run("validate", "bad.jsonl").output

    assert "\x1b" not in output
    assert "\u202e" not in output
    assert "no\\x1b]0;x\\x07.png" in output


def test_text_that_looks_like_markup_is_shown_as_it_is(root: Path):
    write_samples(root / "bad.jsonl", [sample("[bold]x[/]", "no[red].png"), sample("2", "a.png")])

    assert "'no[red].png'" in run("validate", "bad.jsonl").output
    assert "'[bold]x[/]'" in run("validate", "bad.jsonl").output


def test_json_has_everything():
    result = run("validate", "bad.jsonl", "--format", "json")
    report = json.loads(result.stdout)

    assert result.exit_code == 1
    assert report["version"] == 1
    assert report["counts"] == {"T101": 1}
    assert (report["num_lines"], report["num_valid"], report["num_errors"]) == (2, 1, 1)
    assert report["diagnostics"] == [
        {
            "code": "T101",
            "severity": "error",
            "message": "the answer is empty",
            "help": "leave 'assistant' out where there is no answer",
            "file": "bad.jsonl",
            "line": 2,
            "column": None,
            "pointer": "/conversations/0/assistant",
            "sample_id": "2",
            "labels": [],
            "num_findings": 1,
        }
    ]


def test_rules_are_selected_and_ignored_by_code():
    assert run("validate", "bad.jsonl", "--ignore", "D,T1").exit_code == 0
    assert run("validate", "bad.jsonl", "--select", "I", "--select", "D101").exit_code == 0


def test_options_reach_the_rules(root: Path):
    write_samples(root / "test.jsonl", [sample("1", answer=None)])
    Image.new("RGB", (400, 1)).save(root / "images" / "long.png")
    write_samples(root / "long.jsonl", [sample("1", "long.png")])

    assert run("validate", "test.jsonl").exit_code == 1
    assert run("validate", "test.jsonl", "--allow-missing-answer").exit_code == 0
    assert run("validate", "long.jsonl").exit_code == 0
    assert "I105" in run("validate", "long.jsonl", "--num_crops", "1").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'FILES...'"),
        (["nope.jsonl"], "'nope.jsonl' does not exist"),
        (["good.jsonl", "--images", "nowhere"], "'nowhere' does not exist"),
        (["good.jsonl", "--select", "T1O1"], "did you mean T101?"),
        (["good.jsonl", "--num_crops", "0"], "0 is not in the range"),
        (["good.jsonl", "--severity", "T101=loud"], "expected CODE=error, warning or off"),
        (["good.jsonl", "--severity", "T1O1=off"], "did you mean T101?"),
    ],
)
def test_wrong_usage_exits_2_with_one_line(arguments: list[str], message: str):
    result = run("validate", *arguments)

    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("output_format", ["text", "concise", "json", "sarif", "github"])
def test_every_format_has_the_finding_and_the_same_exit_status(output_format: str):
    result = run("validate", "bad.jsonl", "--format", output_format)

    assert result.exit_code == 1
    assert "T101" in result.stdout
    assert "the answer is empty" in result.stdout
    assert run("validate", "good.jsonl", "--format", output_format).exit_code == 0


def test_severities_are_set_by_code():
    result = run("validate", "bad.jsonl", "--severity", "T=warning", "--format", "concise")

    assert result.exit_code == 0
    assert result.stdout.endswith(
        "no errors, 1 warning: 2 of 2 samples valid (1 image looked at)\n"
    )
    assert run("validate", "bad.jsonl", "--severity", "T=error,T101=off").exit_code == 0
    assert run("validate", "bad.jsonl", "--severity", "T=off,T101=error").exit_code == 1


def test_it_stops_at_max_errors_and_says_so(root: Path):
    write_samples(root / "bad.jsonl", [sample(str(i), answer=" ") for i in range(20_000)])
    result = run("validate", "bad.jsonl", "--max_errors", "3")

    assert result.exit_code == 1
    assert "20,000 errors" not in result.stdout
    assert result.stderr == (
        "stopped: there are 3 errors or more (max_errors); the rest was not looked at\n"
    )
    assert "stopped" not in run("validate", "good.jsonl", "--max_errors", "3").output


def test_pyproject_toml_sets_what_the_command_line_does_not(root: Path):
    (root / "pyproject.toml").write_text(
        "[tool.phi3v-data.validate]\nseverity = {T101 = 'warning'}\nformat = 'concise'\n"
    )

    assert run("validate", "bad.jsonl").stdout.startswith("bad.jsonl:2:79: T101 the answer")
    assert run("validate", "bad.jsonl", "--severity", "T101=error").exit_code == 1
    assert run("validate", "bad.jsonl", "--format", "json").stdout.startswith("{")


def test_rules_are_ignored_for_files_by_glob(root: Path):
    (root / "pyproject.toml").write_text(
        "[tool.phi3v-data.validate.per-file-ignores]\n'b*.jsonl' = ['T101']\n"
    )
    write_samples(root / "other.jsonl", [sample("1", answer=" ")])

    assert run("validate", "bad.jsonl", "good.jsonl").exit_code == 0
    result = run("validate", "bad.jsonl", "other.jsonl", "--format", "concise")
    assert result.exit_code == 1
    assert result.stdout.startswith("other.jsonl:1:")


def test_a_wrong_setting_names_its_file_and_exits_2(root: Path):
    (root / "pyproject.toml").write_text("[tool.phi3v-data.validate]\nselects = ['T']\n")
    result = run("validate", "good.jsonl")

    assert result.exit_code == 2
    assert "pyproject.toml: [tool.phi3v-data.validate]: unknown key 'selects'" in result.stderr
    assert "did you mean select?" in result.stderr


def test_rules_lists_and_explains():
    listed = run("rules").output
    explained = run("rules", "i101").output

    assert "I104  warning  An image's file name promises" in listed
    assert explained.startswith("I101 missing-image (error)\n\nAn image file is not there")
    assert run("rules", "X").exit_code == 2
    assert run("rules", "P10").output.count("\nP10") >= 5


def test_schema_prints_the_json_schema():
    schema = json.loads(run("schema").output)

    assert schema["title"] == "Sample"
    assert set(schema["required"]) == {"id", "source", "conversations"}


@pytest.mark.parametrize("command", ["validate", "shard", "verify", "rules", "schema"])
def test_help_shows_an_example(command: str):
    assert f"\n    phi3v-data {command}" in run(command, "--help").output


def test_fix_writes_a_repaired_file_and_says_what_is_left(root: Path):
    lines = [sample("1", "a.png").to_json(), sample("2", "a.png").to_json()]
    faulty = lines[0].replace('"user"', '"usr"')
    (root / "f.jsonl").write_text("\n".join([faulty, lines[1]]) + "\n")
    assert run("validate", "f.jsonl").exit_code == 1
    result = run("validate", "f.jsonl", "--unsafe-fix")
    assert result.exit_code == 0, result.output
    assert "f.jsonl → f.fixed.jsonl: 1 line repaired" in result.output
    assert (root / "f.fixed.jsonl").read_text().splitlines() == lines
    lone = run("validate", "f.jsonl", "--in_place")
    assert lone.exit_code == 2
    assert "add one of them" in lone.output


def test_ctrl_c_ends_a_large_validation_with_one_word(root: Path):
    line = sample("1", "a.png").to_json() + "\n"
    (root / "large.jsonl").write_text(line * 400_000)
    program = Path(sys.executable).with_name("phi3v-data")
    process = subprocess.Popen(
        [program, "validate", "large.jsonl", "--select", "S"],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # its own group, as a terminal gives it
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children.read_text().split()) < 2:  # its workers are there
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (130, "", "interrupted\n")
