"""Images of a data set, each looked at once: what is kept of them, and what is only counted."""

import os
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from phi3v_data import validate, write_samples
from phi3v_data.checked_lines import LINE_RULES, MAX_PER_RULE, check
from phi3v_data.rules import Context, Finding, select_rules
from phi3v_data.rules.rule import Rule
from phi3v_data.schema import Sample, Turn
from PIL import Image

from tests.data.line_report import ReportBuilder


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (10, 10)).save("images/plain.png")
    Image.new("RGBA", (10, 10)).save("images/alpha.png")
    Image.new("P", (10, 10)).save("images/palette.png")
    return tmp_path


def links(of: str, number: int) -> list[str]:
    """So many names of one picture."""
    stem, suffix = of.split(".")
    names = [f"{stem}-{k:04}.{suffix}" for k in range(number)]
    for name in names:
        os.link(Path("images") / of, Path("images") / name)
    return names


def write(name: str, *images: tuple[str, ...]) -> str:
    """A sample for each tuple of images."""
    samples = [
        Sample(
            id=f"{name}-{k}",
            source="toy",
            conversations=(Turn(images=paths, user=f"Which {name} {k}?", assistant="It."),),
        )
        for k, paths in enumerate(images)
    ]
    write_samples(name, samples)
    return name


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_trait_of_all_images_is_counted_and_kept_in_part(root: Path, num_workers: int):
    write("a.jsonl", *((name,) for name in links("alpha.png", 250)))
    report = validate(["a.jsonl"], num_workers=num_workers)

    assert report.counts == {"I114": 250}
    assert report.counts_by_file == {"a.jsonl": {"I114": 250}}
    assert [found.line for found in report.diagnostics] == list(range(1, MAX_PER_RULE + 1))
    assert (report.num_valid, report.exit_status) == (250, 0)


def test_a_trait_that_is_made_an_error_makes_every_line_invalid(root: Path):
    write("a.jsonl", *((name,) for name in links("alpha.png", 150)), ("plain.png",))
    rules = tuple(
        Rule(rule.code, "error", rule.subject, rule.check) for rule in select_rules(("I114",))
    )
    report = validate(["a.jsonl"], rules_for=lambda file: rules, num_workers=1)

    assert (report.counts, report.num_valid, report.exit_status) == ({"I114": 150}, 1, 1)


def test_counts_are_those_of_looking_at_lines_one_by_one(root: Path):
    numbers = random.Random(5)
    names = [*links("alpha.png", 130), *links("palette.png", 130), *links("plain.png", 50)]
    names += ["missing.png", "../outside.png", *(f"gone-{k}.png" for k in range(20))]
    files = [
        write(name, *(tuple(numbers.choices(names, k=3)) for _ in range(200)))
        for name in ("a.jsonl", "b.jsonl")
    ]
    one_by_one = ReportBuilder(LINE_RULES)
    by_file: Counter[tuple[str, str]] = Counter()
    for checked in check(files):
        one_by_one.add(checked)
        by_file.update((checked.file, found.code) for found in checked.diagnostics)
    expected = one_by_one.report(files)
    report = validate(files, select=["I"], num_workers=1)

    assert report.counts == expected.counts
    assert report.num_valid == expected.num_valid
    assert report.counts["I114"] > 2 * MAX_PER_RULE
    for file, counts in report.counts_by_file.items():
        assert counts == {code: n for (of, code), n in by_file.items() if of == file}


# --- rules of other packages ----------------------------------------------------------------------

seen: list[tuple[str, ...]] = []


def two_of_one_size(sample: Sample, context: Context) -> Iterator[Finding]:
    """Two images of a sample have one size."""
    checks = [context.images[path] for path in sample.images]
    seen.append(sample.images)
    sizes = [check.info and check.info.width for check in checks]
    if len(set(sizes)) < len(sizes):
        yield Finding("two images have one size")


def test_a_rule_of_another_package_sees_all_images_of_every_sample(root: Path):
    seen.clear()
    Image.new("RGB", (20, 20)).save("images/large.png")
    write("a.jsonl", ("plain.png", "large.png"), ("plain.png", "alpha.png"), ("large.png",), ())
    theirs = Rule("I901", "warning", "sample", two_of_one_size)
    rules = (*select_rules(("I",)), theirs)
    report = validate(["a.jsonl"], rules_for=lambda file: rules, num_workers=1)

    assert set(seen) == {("plain.png", "large.png"), ("plain.png", "alpha.png"), ("large.png",)}
    assert [(found.code, found.line) for found in report.diagnostics] == [("I114", 2), ("I901", 2)]


# --- the cache of checks --------------------------------------------------------------------------


def test_the_cache_is_opened_once_a_process_and_closed(root: Path, monkeypatch: pytest.MonkeyPatch):
    opened: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def counted(*arguments: Any, **settings: Any) -> sqlite3.Connection:
        opened.append(connect(*arguments, **settings))
        return opened[-1]

    monkeypatch.setattr(sqlite3, "connect", counted)
    write("a.jsonl", *((name,) for name in links("plain.png", 300)))
    report = validate(["a.jsonl"], use_cache=True, num_workers=1)

    assert (report.num_images, report.cache_problem) == (300, "")
    assert len(opened) == 1
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        opened[0].execute("SELECT 1")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_what_workers_noted_is_there_in_the_next_run(root: Path, num_workers: int):
    names = links("plain.png", 150)
    long_ago = 1_000_000_000
    for name in ("plain.png", *names):
        os.utime(f"images/{name}", (long_ago, long_ago))
    write("a.jsonl", *((name,) for name in names))
    time.sleep(2.1)  # links changed the file just now, and what is fresh is not noted
    validate(["a.jsonl"], use_cache=True, num_workers=num_workers)
    with sqlite3.connect(root / "cache" / "phi3v-data" / "images.sqlite3") as connection:
        ((number,),) = connection.execute("SELECT count(*) FROM checks").fetchall()
    connection.close()

    assert number == 150


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_cache_that_cannot_be_written_is_told_once_and_changes_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
):
    (root / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "file"))
    write("a.jsonl", *((name,) for name in links("alpha.png", 150)))
    report = validate(["a.jsonl"], use_cache=True, num_workers=num_workers)

    assert report.counts == {"I114": 150}
    assert report.cache_problem.startswith("no cache at ")


# --- files that no sample names -------------------------------------------------------------------


def test_I110_is_one_finding_for_all_files_of_a_root(root: Path):
    links("plain.png", 7)
    files = [write("train.jsonl", ("alpha.png",), ("palette.png",)), write("val.jsonl", ())]
    report = validate(files, select=["I110"], num_workers=1)
    (found,) = report.diagnostics

    assert (found.code, found.severity, found.file, found.line) == (
        "I110",
        "warning",
        "train.jsonl",
        None,
    )
    assert found.message == (
        "no sample names 8 image files under 'images': 'plain-0000.png', 'plain-0001.png', "
        "'plain-0002.png', 'plain-0003.png', 'plain-0004.png', …"
    )
    assert (found.num_findings, report.num_images, report.num_valid) == (8, 0, 3)


def test_I110_counts_files_that_any_split_names_as_used(root: Path):
    files = [write("a.jsonl", ("alpha.png", "./plain.png")), write("b.jsonl", ("palette.png",))]

    assert validate(files, select=["I110"]).counts == {}
    (found,) = validate(files[:1], select=["I110"]).diagnostics
    assert found.message == "no sample names 1 image file under 'images': 'palette.png'"


def test_I110_is_off_unless_named(root: Path):
    write("a.jsonl", ("alpha.png",))

    assert "I110" not in validate(["a.jsonl"]).rules
    assert "I110" not in validate(["a.jsonl"], select=["I"]).rules


def test_a_missing_root_is_reported_as_missing_not_as_unused(root: Path):
    write("a.jsonl", ("alpha.png",))
    report = validate(["a.jsonl"], images="no", select=["I101", "I110"])

    assert report.counts == {"I101": 1}
