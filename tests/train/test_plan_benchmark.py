"""`benchmarks/plan.py` on a small setting: what it prints, and what it compares with."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "plan.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_plan", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_it_prints_three_tables_and_writes_them_as_json(
    benchmark: ModuleType, tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    arguments = ["--samples", "50000", "--mix_samples", "600", "--shards", "100"]
    result = CliRunner().invoke(benchmark.main, [*arguments, "--json", str(file)])
    content = json.loads(file.read_text())
    lines = result.output.splitlines()
    for head, rows in (
        (benchmark.COST_HEAD, [benchmark.Cost(**row) for row in content["costs"]]),
        (benchmark.PACKING_HEAD, [benchmark.Packing(**row) for row in content["packings"]]),
        (benchmark.MIXING_HEAD, [benchmark.Mixing(**row) for row in content["mixings"]]),
    ):
        start = lines.index(head) + 1
        assert lines[start : start + len(rows)] == [row.line() for row in rows]
    # Time is for its readers; a last, short step makes few samples uneven. Rows are certain.
    assert all(row["run"] <= row["offline_equal"] for row in content["packings"])
    assert all(row["offline_equal"] >= row["bound_equal"] for row in content["packings"])


@pytest.mark.parametrize("name", ["DocVQA", "NLVR2", "UCF-101", "mixed"])
def test_ranks_are_even_within_five_percent_where_random_dealing_may_not_be(
    benchmark: ModuleType, name: str
) -> None:
    mix = benchmark.length_mixes(64 * 30)[name]
    row = benchmark.measure_packing(name, mix, 64, 8, 8192)
    assert row.balance > 0.95
    assert row.run <= 1.03 * row.offline_equal
    assert row.balance >= row.random_balance


def test_the_mixes_are_those_of_real_images(benchmark: ModuleType) -> None:
    mixes = benchmark.length_mixes(500)
    assert set(mixes["UCF-101"].num_tokens) == {8 * 757 + 62}
    assert 2300 < np.mean(mixes["DocVQA"].num_tokens) < 2500  # 2,443 in the real set
    assert np.mean(mixes["DocVQA"].num_crops) == pytest.approx(16.3, abs=1)


def test_mixing_of_the_files_themselves_is_none(benchmark: ModuleType) -> None:
    mixing, distinct = benchmark.measure_mixing("files", np.arange(1000), 10, 50, 10.0)
    assert (mixing.correlation, mixing.mix, distinct) == (pytest.approx(1), 0.1, 1)
    assert mixing.live == pytest.approx(0.1)


@pytest.mark.slow
def test_ten_million_samples_are_planned_in_a_minute_of_one_core_and_two_gigabytes(
    benchmark: ModuleType,
) -> None:
    cost = benchmark.measure_cost("plan and summary", 10_000_000, 64, 8)
    assert cost.cpu_seconds < 60
    assert cost.peak_bytes < 2e9
