"""The benchmarks run, on their smallest setting. What they measure is for their readers."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def encode() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_encode", BENCHMARKS / "encode.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_encode_prints_ratios_and_writes_them_as_json(encode: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "encode.json"
    result = CliRunner().invoke(
        encode.main, ["--rounds", "1", "--cases", "1", "--json", str(file)], catch_exceptions=False
    )
    assert result.exit_code == 0
    content = json.loads(file.read_text())
    assert content["rounds"] == 1
    assert {"pillow", "torch", "num_cpus"} <= content.keys()
    (case,) = content["results"]
    lines = [re.split(r" {2,}", line) for line in result.output.splitlines()]
    for start, sides in case["ratios"].items():
        for clock in ("cpu", "wall"):
            exact, fast = (
                "{median:.2f} ({min:.2f}-{max:.2f})".format(**sides[side][clock])
                for side in ("exact", "fast")
            )
            assert [case["case"], start, clock, exact, fast] in [line[:5] for line in lines]


def test_encode_compares_pixel_values_before_it_times_them(encode: ModuleType) -> None:
    result = encode.measure(encode.CASES[0], rounds=1)
    assert result.largest_difference <= 2e-6
    assert result.published_bytes / result.our_bytes == 5
    assert 0 < result.fast_mean_steps < result.fast_max_steps <= 2


@pytest.mark.parametrize("size_wh", [(480, 640), (100, 100), (700, 90)])
def test_the_restated_steps_are_what_our_pixels_become_on_the_device(
    encode: ModuleType, size_wh: tuple[int, int]
) -> None:
    case = encode.Case("toy", lambda: encode.make_photo(*size_wh), 4, target=1)
    assert encode.measure(case, rounds=1).largest_difference <= 2e-6


def test_a_ratio_is_taken_round_by_round(encode: ModuleType) -> None:
    assert encode.ratio([2, 8, 30], [1, 2, 5]) == encode.Ratio(median=4, min=2, max=6)


def test_the_sides_take_turns_and_every_other_round_goes_backwards(encode: ModuleType) -> None:
    calls: list[str] = []
    names = ("published", "exact")
    seconds = encode.time_in_turns({n: lambda n=n: calls.append(n) for n in names}, rounds=2)
    assert calls[:: encode.REPEATS] == ["published", "exact", "exact", "published"]
    assert all(len(values) == 2 for clocks in seconds.values() for values in clocks.values())
