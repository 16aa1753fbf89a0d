"""Rules of another package, installed as such packages are."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from phi3v_data import Sample, Turn, write_samples

RULES = '''
from phi3v_data.rules import Finding
from phi3v_data.rules.rule import Rule

def shouting(sample, context):
    """An answer is in capitals.

    People do not like to be shouted at.
    """
    for t, turn in enumerate(sample.conversations):
        if turn.assistant and turn.assistant.isupper():
            yield Finding("the answer shouts", "lower your voice", f"/conversations/{t}/assistant")

def bare(sample, context):
    yield from ()

LOUD = Rule("X101", "warning", "sample", shouting)
MANY = [Rule("X102", "error", "sample", shouting, is_default=False), LOUD]
TAKEN = Rule("P101", "error", "sample", shouting)
LOWER = Rule("x1", "error", "sample", shouting)
BARE = Rule("X103", "error", "sample", bare)
'''
ENTRIES = """[phi3v_data.rules]
a = loud_rules:LOUD
many = loud_rules:MANY
taken = loud_rules:TAKEN
lower = loud_rules:LOWER
bare = loud_rules:BARE
missing = loud_rules:MISSING
module = no_such_module:RULES
number = loud_rules:__name__
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


def write_wheel(folder: Path) -> Path:
    """A package of one module, as a wheel."""
    dist = "loud_rules-1.0.dist-info"
    files = {
        "loud_rules.py": RULES,
        f"{dist}/METADATA": "Metadata-Version: 2.1\nName: loud-rules\nVersion: 1.0\n",
        f"{dist}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nTag: py3-none-any\n"
        "Root-Is-Purelib: true\n",
        f"{dist}/entry_points.txt": ENTRIES,
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{dist}/RECORD"])
    wheel = folder / "loud_rules-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in {**files, f"{dist}/RECORD": record}.items():
            archive.writestr(name, text)
    return wheel


@pytest.fixture
def phi3v_data(tmp_path: Path) -> Run:
    """The program in a fresh process that sees the package."""
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not on the path")
    site = tmp_path / "site"
    install = (uv, "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site)
    subprocess.run([*install, write_wheel(tmp_path)], check=True)

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("phi3v-data")), *args]
        environment = {**os.environ, "PYTHONPATH": str(site)}
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )

    return run


def test_rules_of_another_package_are_listed_and_broken_ones_are_named(phi3v_data: Run):
    listed = phi3v_data("rules")
    assert "X101  warning  An answer is in capitals." in listed.stdout
    assert "X102  error    An answer is in capitals. (off by default)" in listed.stdout
    assert "X10" not in phi3v_data("rules", "--format", "markdown").stdout
    problems = {
        "bare": "X103 has no docstring, which is its documentation",
        "lower": "code 'x1': expected capital letters, then digits, as in X101",
        "many": "code X101 is already one of a",
        "missing": "loud_rules:MISSING: AttributeError: module 'loud_rules' has no attribute",
        "module": "no_such_module:RULES: ModuleNotFoundError: No module named 'no_such_module'",
        "number": "loud_rules:__name__: expected a Rule or a list of them, got 'loud_rules'",
        "taken": "code P101 is already one of phi3v-data",
    }
    for name, problem in problems.items():
        assert f"warning: rules {name!r} are installed but broken: {problem}" in listed.stderr
    assert len(listed.stderr.splitlines()) == len(problems)


def test_rules_of_another_package_run(phi3v_data: Run, tmp_path: Path):
    turns = (Turn(user="u", assistant="RED"),)
    write_samples(tmp_path / "x.jsonl", [Sample(id="1", source="toy", conversations=turns)])

    checked = phi3v_data("validate", "x.jsonl", "--format", "concise")
    assert checked.returncode == 0
    assert checked.stdout.startswith("x.jsonl:1:")
    assert "X101 the answer shouts" in checked.stdout
    assert phi3v_data("validate", "x.jsonl", "--ignore", "X").stdout.startswith("no errors:")
    assert phi3v_data("validate", "x.jsonl", "--select", "X102").returncode == 1
