"""What each format makes of a report; the reports are made here, the files too."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from phi3v_data.diagnostics import Diagnostic, Label, Report
from phi3v_data.report import FORMATS, print_report, print_text, to_json
from phi3v_data.report_concise import to_concise
from phi3v_data.report_github import to_github
from phi3v_data.report_sarif import to_sarif
from phi3v_data.report_source import read_spots
from rich.cells import cell_len
from rich.console import Console

LINE = '{"id": "a", "source": "toy", "conversations": [{"user": "What?", "assistant": " "}]}'

# The OASIS schema, as the package sarif_om 1.0.4 (MIT) ships it.
SCHEMA = Path(__file__).resolve().parents[1] / "golden/sarif-schema-2.1.0-rtm.4.json"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text(f"{LINE}\n{LINE}\n")
    return tmp_path


def finding(**changes: Any) -> Diagnostic:
    diagnostic = Diagnostic(
        code="T101",
        severity="error",
        message="the answer is empty",
        help="leave it out",
        file="x.jsonl",
        line=2,
        pointer="/conversations/0/assistant",
        sample_id="a",
    )
    return replace(diagnostic, **changes)


def report(*diagnostics: Diagnostic, **changes: Any) -> Report:
    counts: dict[str, int] = {}
    for diagnostic in diagnostics:
        counts[diagnostic.code] = counts.get(diagnostic.code, 0) + 1
    made = Report(
        files=("x.jsonl",),
        num_lines=2,
        num_valid=1,
        num_images=0,
        counts=counts,
        diagnostics=diagnostics,
        rules=("T101", "I104"),
        severities={"T101": "error", "I104": "warning"},
    )
    return replace(made, **changes)


def text(*diagnostics: Diagnostic, width: int = 80) -> list[str]:
    """The lines of the text format up to the summary."""
    console = Console(width=width, soft_wrap=True, highlight=False, color_system=None)
    with console.capture() as capture:
        print_text(report(*diagnostics), console)
    return capture.get().split("\n\n")[0].splitlines()


def test_text_shows_the_line_with_the_place_underlined():
    assert text(finding(), width=100) == [
        "x.jsonl:2:79: error T101 the answer is empty",
        "  |",
        "2 | " + LINE,
        "  | " + " " * 78 + "^^^",
        "  = at: /conversations/0/assistant of sample 'a'",
        "  = help: leave it out",
    ]


def test_text_cuts_a_line_to_the_width_around_the_place():
    lines = text(finding(), width=50)

    assert lines[2:4] == [
        '2 | …ons": [{"user": "What?", "assistant": " "}]}',
        "  | " + " " * 39 + "^^^",
    ]
    assert max(len(line) for line in lines[2:4]) <= 50


@pytest.mark.parametrize("width", [24, 40, 79, 80, 200])
def test_no_excerpt_is_wider_than_the_terminal(folder: Path, width: int):
    long = LINE.replace("What?", "日本 \x07 語" * 3000)
    (folder / "x.jsonl").write_text(f"{long}\n" * 2)
    for pointer in ("/id", "/conversations/0/user", "/conversations/0/assistant", "/nothing"):
        shown = text(finding(pointer=pointer), width=width)

        assert sum("^" in line for line in shown) == 1
        assert max(cell_len(line) for line in shown[1:4]) <= max(width, 24), shown


def test_wide_characters_keep_the_underline_in_place(folder: Path):
    (folder / "x.jsonl").write_text("\n" + LINE.replace('"a"', '"日本"'))

    assert text(finding(pointer="/source"), width=100)[2:4] == [
        "2 | " + LINE.replace('"a"', '"日本"'),
        "  |" + " " * 26 + "^^^^^",
    ]


def test_control_characters_of_the_line_are_spelt_out(folder: Path):
    (folder / "x.jsonl").write_bytes(b'\n{"id": "\x1b[2J\xe2\x80\xae", "x": nul}')
    shown = text(finding(pointer="", column=22, code="T101"))

    assert shown[2:4] == [
        '2 | {"id": "\\x1b[2J\\u202e", "x": nul}',
        "  |" + " " * 30 + "^^^",
    ]


def test_the_end_of_a_line_can_be_underlined(folder: Path):
    (folder / "x.jsonl").write_bytes(b'\n{"id": "a')

    assert text(finding(pointer="", column=10))[2:4] == ['2 | {"id": "a', "  |          ^"]


def test_an_object_that_lacks_a_key_is_marked_by_its_bracket():
    assert text(finding(pointer="/metadata"), width=100)[3] == "  | ^"


def test_another_place_in_the_file_is_shown_where_it_comes(folder: Path):
    (folder / "x.jsonl").write_text(f"{LINE}\n" * 12)
    label = Label("first used here", "x.jsonl", 1, "/id")
    shown = text(finding(line=12, pointer="/id", labels=(label,)), width=40)

    assert shown[1:8] == [
        "   |",
        ' 1 | {"id": "a", "source": "toy", "con…',
        "   |        --- first used here",
        "...",
        '12 | {"id": "a", "source": "toy", "con…',
        "   |        ^^^",
        "   = at: /id of sample 'a'",
    ]


def test_another_place_in_the_same_line_gets_its_own_underline():
    label = Label("the question", "x.jsonl", 2, "/conversations/0/user")

    assert text(finding(labels=(label,)), width=100)[2:5] == [
        "2 | " + LINE,
        "  | " + " " * 78 + "^^^",
        "  | " + " " * 56 + "------- the question",
    ]


def test_a_place_in_another_file_is_shown_after_it(folder: Path):
    (folder / "val.jsonl").write_text(LINE)
    label = Label("also here", "val.jsonl", 1, "/id")
    shown = text(finding(pointer="/id", labels=(label,)), width=100)

    assert shown[2:7] == [
        "2 | " + LINE,
        "  |        ^^^",
        "  ::: val.jsonl:1:8",
        "1 | " + LINE,
        "  |        --- also here",
    ]


def test_a_finding_about_a_whole_file_has_no_excerpt():
    shown = text(finding(line=None, pointer="", sample_id=None, num_findings=40_000))

    assert shown == [
        "x.jsonl: error T101 the answer is empty",
        "  = note: one of 40,000 findings with the same cause",
        "  = help: leave it out",
    ]


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe\n\x00[\n", b"\n[1, 2"])
def test_a_file_that_changed_meanwhile_is_no_crash(folder: Path, content: bytes | None):
    (folder / "x.jsonl").unlink()
    if content is not None:
        (folder / "x.jsonl").write_bytes(content)
    label = Label("first used here", "x.jsonl", 1, "/id")
    found = report(finding(labels=(label,)), finding(column=500, pointer=""))

    assert text(*found.diagnostics)[0].startswith("x.jsonl:2")
    assert next(to_concise(found)).startswith("x.jsonl:2")
    assert next(to_github(found)).startswith("::error file=x.jsonl,line=2")
    check_sarif(found)


def test_a_file_is_read_once_and_only_as_far_as_needed(folder: Path):
    (folder / "x.jsonl").write_text(f"{LINE}\n" * 1000)
    spots = read_spots([finding(line=n) for n in (3, 7)])

    assert spots.position(finding(line=3)) == "x.jsonl:3:79"
    assert spots.of(finding(line=5)) is None


def test_what_is_left_out_is_counted(capsys: pytest.CaptureFixture[str]):
    print_text(report(finding(), counts={"T101": 1500}))
    output = capsys.readouterr().out

    assert "Not shown, counted below: 1,499 of T101\n" in output
    assert "T101   error      empty-answer   1,500" in output
    assert output.endswith("1,500 errors: 1 of 2 samples valid (0 images looked at)\n")


def alike(file: str, number: int, code: str = "I114") -> list[Diagnostic]:
    """A trait of the image in each line of a file."""
    return [
        finding(
            code=code,
            severity="warning",
            message=f"image '{line}.png' has transparency",
            file=file,
            line=line,
        )
        for line in range(1, number + 1)
    ]


def test_a_trait_of_many_images_is_one_entry_with_the_first_lines(
    capsys: pytest.CaptureFixture[str],
):
    found = report(
        *alike("x.jsonl", 100),
        *alike("y.jsonl", 2),
        counts={"I114": 5002},
        counts_by_file={"x.jsonl": {"I114": 5000}, "y.jsonl": {"I114": 2}},
        severities={"I114": "warning"},
    )
    print_text(found)
    output = capsys.readouterr().out

    assert output.count("has transparency") == 3  # one for x.jsonl, and two are not many
    assert "x.jsonl:1:79: warning I114 image '1.png' has transparency\n" in output
    note = "and 4,999 more of I114 in this file: lines 2, 3, 4, 5, 6, 7, 8, 9, …\n"
    assert output.count(f"  = note: {note}") == 1
    assert "Not shown" not in output
    assert "I114   warning    transparent-image   5,002" in output


def test_a_trait_without_counts_by_file_counts_what_is_kept(capsys: pytest.CaptureFixture[str]):
    found = report(*alike("x.jsonl", 5), counts={"I114": 900}, severities={"I114": "warning"})
    print_text(found)
    output = capsys.readouterr().out

    assert "and 4 more of I114 in this file: lines 2, 3, 4, 5\n" in output
    assert "Not shown, counted below: 895 of I114\n" in output


def test_errors_and_other_rules_are_shown_one_by_one(capsys: pytest.CaptureFixture[str]):
    errors = [replace(one, severity="error") for one in alike("x.jsonl", 6)]
    print_text(
        report(
            *errors, *alike("x.jsonl", 6, "I109"), severities={"I114": "error", "I109": "warning"}
        )
    )

    assert capsys.readouterr().out.count("has transparency") == 12


def test_only_the_text_format_groups(capsys: pytest.CaptureFixture[str]):
    found = report(*alike("x.jsonl", 50), severities={"I114": "warning"})

    assert len(json.loads(to_json(found))["diagnostics"]) == 50
    assert len(check_sarif(found)["results"]) == 50
    print_report(found, "concise")
    assert capsys.readouterr().out.count("has transparency") == 50


def test_concise_is_one_line_a_finding():
    found = report(finding(message="a\nb"), finding(line=None, severity="warning", code="I104"))

    assert list(to_concise(found)) == [
        "x.jsonl:2:79: T101 a\\nb",
        "x.jsonl: I104 the answer is empty",
        "1 error, 1 warning: 1 of 2 samples valid (0 images looked at)",
    ]


def test_github_commands_are_escaped():
    hostile = finding(file="a,b:c%.jsonl", message="100%\r\n::warning::x", help="", line=1)
    (command, summary) = to_github(report(hostile))

    assert command == (
        "::error file=a%2Cb%3Ac%25.jsonl,line=1,endLine=1,title=T101 empty-answer"
        "::100%25\\r\\n::warning::x"
    )
    assert summary == "1 error: 1 of 2 samples valid (0 images looked at)"


def test_github_commands_have_line_and_columns():
    label = Label("first used here", "x.jsonl", 1, "/id")
    command = next(to_github(report(finding(labels=(label,), severity="warning"))))

    assert command == (
        "::warning file=x.jsonl,line=2,endLine=2,col=79,endColumn=81,title=T101 empty-answer::"
        "the answer is empty%0Ahelp: leave it out%0Afirst used here: x.jsonl:1:8"
    )


def check_sarif(found: Report) -> dict[str, Any]:
    """The run of a report as SARIF, after its check against the schema."""
    log = json.loads(to_sarif(found))
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft4Validator(schema, format_checker=jsonschema.FormatChecker()).validate(log)
    (run,) = log["runs"]
    return run


def test_sarif_is_valid_and_points_at_characters():
    label = Label("first used here", "x.jsonl", 1, "/id")
    diagnostics = (
        finding(labels=(label,), num_findings=3),
        finding(code="I104", severity="warning", file="a b/ü.jsonl", line=None),
        finding(file="/data/x.jsonl", pointer="", column=3),
    )
    run = check_sarif(report(*diagnostics))
    first, second, third = run["results"]

    assert first["ruleId"] == "T101"
    assert first["ruleIndex"] == 0
    assert first["level"] == "error"
    assert first["message"]["text"] == "the answer is empty\nhelp: leave it out"
    assert first["occurrenceCount"] == 3
    assert first["properties"] == {"pointer": "/conversations/0/assistant", "sampleId": "a"}
    assert first["locations"] == [
        {
            "physicalLocation": {
                "artifactLocation": {"uri": "x.jsonl"},
                "region": {
                    "startLine": 2,
                    "startColumn": 79,
                    "endColumn": 82,
                    "snippet": {"text": '" "'},
                },
            }
        }
    ]
    (related,) = first["relatedLocations"]
    assert related["message"]["text"] == "first used here"
    assert related["physicalLocation"]["region"]["startColumn"] == 8
    assert second["level"] == "warning"
    assert second["locations"][0]["physicalLocation"] == {
        "artifactLocation": {"uri": "a%20b/%C3%BC.jsonl"}
    }
    place = third["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "file:///data/x.jsonl"
    assert place["region"] == {"startLine": 2, "startColumn": 3}


def test_sarif_documents_the_rules_that_ran_with_their_level():
    run = check_sarif(report(finding(), severities={"T101": "warning", "I104": "error"}))
    rules = run["tool"]["driver"]["rules"]

    assert [(r["id"], r["defaultConfiguration"]["level"]) for r in rules] == [
        ("T101", "warning"),
        ("I104", "error"),
    ]
    assert rules[0]["name"] == "empty-answer"
    assert rules[0]["shortDescription"]["text"].endswith(".")
    assert run["columnKind"] == "unicodeCodePoints"
    assert run["properties"]["counts"] == {"T101": 1}


def test_an_empty_report_is_valid_sarif():
    assert check_sarif(report())["results"] == []


def test_json_has_all_fields():
    found = report(finding(labels=(Label("here", "x.jsonl", None),)))
    read = json.loads(to_json(found))

    assert read["version"] == 1
    assert read["severities"] == {"T101": "error", "I104": "warning"}
    assert read["diagnostics"][0]["labels"] == [
        {"message": "here", "file": "x.jsonl", "line": None, "pointer": ""}
    ]


@pytest.mark.parametrize("output_format", FORMATS)
def test_no_format_lets_data_write_control_characters(
    capsys: pytest.CaptureFixture[str], output_format: Any
):
    evil = "\x1b[2J\x07\u009b"
    print_report(report(finding(message=evil, sample_id=evil, help="")), output_format)
    output = capsys.readouterr().out

    assert not set(evil) & set(output) - set("[2J")
    assert "[2J" in output
