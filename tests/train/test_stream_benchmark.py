"""The benchmark of the stream runs, on its smallest setting, with the sides that are installed."""

import json
from pathlib import Path

from click.testing import CliRunner

from tests.test_benchmarks import load


def test_stream_prints_ratios_and_writes_them_as_json(tmp_path: Path) -> None:
    benchmark, file = load("stream"), tmp_path / "stream.json"
    result = CliRunner().invoke(
        benchmark.main,
        ["--rounds", "1", "--samples", "2", "--workers", "1", "--json", str(file)],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    content = json.loads(file.read_text())
    assert [case["num_samples"] for case in content["results"]] == [2, 2]
    for case in content["results"]:
        for side, ratios in case["ratios"].items():
            for clock in ("wall", "cpu"):
                ours, theirs = (case["seconds"][name][clock][0] for name in ("ours", side))
                assert abs(ratios[clock]["median"] - theirs / ours) < 1e-6
        shown = "{median:.2f} ({min:.2f}-{max:.2f})".format(**case["ratios"]["recipe"]["cpu"])
        assert f"{case['case']:28}cpu    {shown}" in result.output
