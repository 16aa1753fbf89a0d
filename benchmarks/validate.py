"""Validating conversations files without images: us, pydantic line by line, DuckDB reading.

    uv run python benchmarks/validate.py --json validate.json

    ours        `phi3v_data.validate`, all default rules on, default workers, from a fresh process's
                point of view: worker processes are started and ended in the time
    faulty      the same on a file of which 1 line in 100 is wrong in one of many ways
    ten times   the same on ten times the lines
    pydantic    `Sample.model_validate_json` on every line in one process, which checks types only
    DuckDB      `read_json` of the file, counting rows and characters of its columns: checks nothing
    mixed       lines that are not all alike: one to three turns, up to two images, line breaks,
                quotes and other alphabets in the texts; against pydantic on the same lines

All on lines of about 600 bytes (but for `mixed`: text only, a question, a class for an answer), in
turns; the medians of ratios of wall time over the rounds; `a core`: of CPU time, all processes
together. `memory` is the largest sum over our processes of PSS, the share of memory that is each
one's own, read from /proc every 20 ms in a run apart.
"""

import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import click
from phi3v_data import validate
from phi3v_data.schema import Sample
from ratios import Ratio

LINE_BYTES = 600

TARGETS = {"pydantic": 3.0, "faulty": 1.10, "ten times": 10.5}
"""pydantic / ours, at least; faulty / ours and ten times / ours, at most."""

MEMORY_TARGET_MB = 150

CLASSES = [f"{a}{b}" for a in ("Apply", "Baby", "Base", "Walking") for b in ("Ball", "Dog", "Lip")]


@dataclass(frozen=True)
class Result:
    """What was measured."""

    num_lines: int
    num_bytes: int
    lines_per_second: float
    """Of ours: the median, on this machine, at this load."""

    ratios: Mapping[str, Ratio]
    peak_pss_mb: float
    num_cores: int
    versions: Mapping[str, str]


def write_lines(path: Path, num_lines: int, faulty: float = 0.0) -> Path:
    """A file of samples with a question each; a part of them faulty."""
    rng = random.Random(0)
    prompt = "Classify the video into one of the following classes: " + ", ".join(CLASSES)
    with open(path, "w") as file:
        for number in range(num_lines):
            words = " ".join(rng.choices(CLASSES, k=32))
            answer = CLASSES[number % len(CLASSES)]
            line = (
                f'{{"id":"train-{number:010d}","source":"made","conversations":[{{"images":[],'
                f'"user":"{prompt}. {number}: {words}","assistant":"{answer}"}}]}}'
            )
            if rng.random() < faulty:
                line = spoil(line, rng)
            file.write(line + "\n")
    return path


def write_mixed_lines(path: Path, num_lines: int) -> Path:
    """A file of conversations as they come from other tools: long and short, in any alphabet."""
    rng = random.Random(0)
    words = [*CLASSES, "line\nbreak", 'a "quoted" word', "Überblick", "☃", "back\\slash", "日本語"]
    with open(path, "w") as file:
        for number in range(num_lines):
            turns = [
                {
                    "images": [] if turn else [f"{number:09d}/{k}.jpg" for k in range(number % 3)],
                    "user": " ".join(rng.choices(words, k=24)),
                    "assistant": " ".join(rng.choices(words, k=4)),
                }
                for turn in range(rng.choice((1, 1, 1, 2, 3)))
            ]
            sample = {"id": f"train-{number:010d}", "source": "made", "conversations": turns}
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")
    return path


def spoil(line: str, rng: random.Random) -> str:
    """A line that is wrong in one of the ways that people meet."""
    old, new = rng.choice(
        [
            ('"user":', '"usr":'), ('"assistant":"', '"assistant":" ","x":"'), ("}]}", "}"),
            ('"source":"made"', '"source":3'), ("Classify", "<|user|>"),
            ('"images":[]', '"images":""'),
            ('"source"', '"source":"x","source"'), ("Classify", "\\u0007"),
        ]
    )  # fmt: skip
    return line.replace(old, new, 1)


def run_pydantic(path: Path) -> int:
    """Types only, line by line."""
    with open(path, "rb") as file:
        return sum(1 for line in file if Sample.model_validate_json(line))


def run_duckdb(path: Path) -> int:
    """Every column is read; nothing is checked."""
    import duckdb

    query = """
        select count(*), sum(length(id)), sum(length(c.user)), sum(length(c.assistant))
        from (select id, unnest(conversations) as c
              from read_json(?, format='newline_delimited', maximum_object_size=16777216))
    """
    row = duckdb.execute(query, [str(path)]).fetchone()
    assert row is not None
    return row[0]


def peak_pss_mb(path: Path) -> float:
    """The largest sum of PSS over a validation's processes, in MiB."""
    code = "import sys; from phi3v_data import validate; validate([sys.argv[1]])"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, sum(pss_mb(pid) for pid in family(process.pid)))
        time.sleep(0.02)
    assert process.returncode == 0
    return peak


def family(pid: int) -> list[int]:
    """A process and those it started, all the way down."""
    try:
        tasks = [
            Path(f"/proc/{pid}/task/{task}/children") for task in os.listdir(f"/proc/{pid}/task")
        ]
        children = [int(child) for task in tasks for child in task.read_text().split()]
    except OSError:
        return [pid]
    return [pid, *(member for child in children for member in family(child))]


def pss_mb(pid: int) -> float:
    """Proportional share of memory, in MiB; 0 of a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    except (OSError, StopIteration):
        return 0.0


def cpu_time() -> float:
    """Seconds of this process and of those it started that have ended, to the microsecond."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(used.ru_utime + used.ru_stime for used in both)


def measure(num_lines: int, rounds: int, folder: Path) -> Result:
    """Run all sides in turns."""
    plain = write_lines(folder / "plain.jsonl", num_lines)
    faulty = write_lines(folder / "faulty.jsonl", num_lines, 0.01)
    mixed = write_mixed_lines(folder / "mixed.jsonl", num_lines)
    tenfold = write_lines(folder / "tenfold.jsonl", 10 * num_lines)
    report = validate([faulty])
    assert 0.005 * num_lines < report.num_lines - report.num_valid < 0.015 * num_lines
    assert validate([plain]).num_errors == 0
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: validate([plain]),
        "faulty": lambda: validate([faulty]),
        "ten times": lambda: validate([tenfold]),
        "pydantic": lambda: run_pydantic(plain),
        "DuckDB": lambda: run_duckdb(plain),
        "our mixed": lambda: validate([mixed], ignore=["I"]),
        "mixed": lambda: run_pydantic(mixed),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            start, start_cpu = time.perf_counter(), cpu_time()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
            cpu_seconds[name].append(cpu_time() - start_cpu)
    ratios: dict[str, Ratio] = {}
    for name in ("faulty", "ten times", "pydantic", "DuckDB", "mixed"):
        base = seconds["our mixed" if name == "mixed" else "ours"]
        values = [theirs / ours for theirs, ours in zip(seconds[name], base, strict=True)]
        ratios[name] = Ratio(statistics.median(values), min(values), max(values))
    values = [
        theirs / ours
        for theirs, ours in zip(cpu_seconds["pydantic"], cpu_seconds["ours"], strict=True)
    ]
    ratios["pydantic, a core"] = Ratio(statistics.median(values), min(values), max(values))
    return Result(
        num_lines=num_lines,
        num_bytes=plain.stat().st_size,
        lines_per_second=num_lines / statistics.median(seconds["ours"]),
        ratios=ratios,
        peak_pss_mb=peak_pss_mb(tenfold),
        num_cores=len(os.sched_getaffinity(0)),
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("phi3v-data", "pydantic", "msgspec", "duckdb")},
        },
    )


@click.command()
@click.option("--lines", default=500_000, show_default=True, type=click.IntRange(1000))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the result here.")
def main(lines: int, rounds: int, json_file: Path | None) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        result = measure(lines, rounds, Path(folder))
    click.echo(
        f"{result.num_lines:,} lines, {result.num_bytes / result.num_lines:.0f} bytes each, "
        f"{result.num_cores} cores, medians of {rounds} rounds\n"
    )
    for name, ratio in result.ratios.items():
        target = TARGETS.get(name)
        bound = "" if target is None else f"   {'>=' if name == 'pydantic' else '<='} {target}"
        click.echo(f"{name:>16} / ours   {ratio}{bound}")
    click.echo(f"{'memory':>16}          {result.peak_pss_mb:.0f} MiB   <= {MEMORY_TARGET_MB}")
    click.echo(f"{'ours':>16}          {result.lines_per_second:,.0f} lines/s here and now")
    click.echo(", ".join(f"{name} {number}" for name, number in result.versions.items()))
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(result), indent=2))


if __name__ == "__main__":
    main()
