"""The benchmarks run, on their smallest setting. What they measure is for their readers."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from tests.data.clips import write_clip

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

CLOCKS = ("cpu", "wall")


def load(name: str) -> ModuleType:
    if str(BENCHMARKS) not in sys.path:  # as a script has it
        sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def encode() -> ModuleType:
    return load("encode")


@pytest.fixture(scope="module")
def convert_video() -> ModuleType:
    return load("convert_video")


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


@pytest.mark.skipif(
    importlib.util.find_spec("av") is None,
    reason="the peers are not installed: uv sync --group bench",
)
def test_convert_video_prints_ratios_and_right_frames_and_writes_them_as_json(
    tmp_path: Path,
) -> None:
    for number in range(2):
        write_clip(tmp_path / "clips" / f"{number}.avi", 20, seed=number)
    # A process of its own, as it is run: it starts itself again, and workers.
    command = [sys.executable, str(BENCHMARKS / "convert_video.py"), "--rounds", "1"]
    command += ["--copies", "1", "--clips", "clips", "--json", "out.json"]
    command += ["--peer", "PyAV, timestamps", "--peer", "OpenCV, read all"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["clips"] == "2 clips"
    assert {"av", "torchcodec", "opencv_avcodec", "num_cpus"} <= content.keys()
    rows = {row["side"]: row for row in content["results"]}
    assert set(rows) == {
        "cookbook", "PyAV, all", "PyAV, timestamps", "OpenCV, read all", "ours", "ours, 2 workers",
    }  # fmt: skip
    lines = [re.split(r" {2,}", line) for line in result.stdout.splitlines()]
    for side, row in rows.items():
        assert [side, "16 of 16"] in [line[:2] for line in lines]
        for ratios in row["ratios"].values():
            texts = ["{median:.2f} ({min:.2f}-{max:.2f})".format(**ratios[c]) for c in CLOCKS]
            assert [side, *texts] in [line[:3] for line in lines]
    assert set(rows["ours"]["ratios"]) == {"PyAV, all", "cookbook"}
    assert rows["ours"]["targets"] == {"cpu": 2.0}


def test_clips_made_for_convert_video_give_all_sides_the_same_work(
    convert_video: ModuleType, tmp_path: Path
) -> None:
    clips = convert_video.make_clips(tmp_path / "clips")
    assert convert_video.list_clips(tmp_path / "clips") == clips
    every = convert_video.decode_all(clips[0])
    assert len({frame.tobytes() for frame in every}) == len(every) == 120
    assert convert_video.count_right(convert_video.decode_ours, clips[0], every, True) == 8


def test_a_frame_in_the_wrong_place_or_none_is_not_right(
    convert_video: ModuleType, tmp_path: Path
) -> None:
    path = write_clip(tmp_path / "a.avi", 20)
    every = convert_video.decode_all(path)

    def decode_late(path: Path) -> list[object]:
        return [every[min(index + 1, 19)] for index in (0, 2, 5, 7, 10, 12, 15, 19)]

    def decode_nothing(path: Path) -> list[object]:
        raise RuntimeError("cannot open it")

    assert convert_video.count_right(decode_late, path, every, False) == 0
    assert convert_video.count_right(decode_nothing, path, every, False) == 0
    assert convert_video.count_right(convert_video.decode_opencv_all, path, every, False) == 8


def test_pyavs_ffmpeg_is_linked_under_the_names_torchcodec_asks_for(
    convert_video: ModuleType, tmp_path: Path
) -> None:
    pytest.importorskip("av", reason="the peers are not installed: uv sync --group bench")
    if not convert_video.link_ffmpeg(tmp_path):
        pytest.skip("FFmpeg is installed, or PyAV came without its own")
    names = {path.name for path in tmp_path.iterdir()}
    assert any(re.fullmatch(r"libavcodec\.so\.\d+", name) for name in names)
    assert all(path.exists() for path in tmp_path.iterdir())


def test_validate_prints_ratios_and_memory(tmp_path: Path) -> None:
    file = tmp_path / "validate.json"
    result = CliRunner().invoke(
        load("validate").main, ["--lines", "2000", "--rounds", "1", "--json", str(file)],
        catch_exceptions=False,
    )  # fmt: skip
    assert "pydantic / ours" in result.output
    measured = json.loads(file.read_text())
    assert measured["num_lines"] == 2000
    assert {"faulty", "ten times", "pydantic", "pydantic, a core", "DuckDB", "mixed"} == set(
        measured["ratios"]
    )
    assert measured["peak_pss_mb"] > 10


def test_validate_spoils_lines_in_ways_that_are_found(tmp_path: Path) -> None:
    import random

    import phi3v_data

    module = load("validate")
    path = module.write_lines(tmp_path / "x.jsonl", 1)
    line, rng = path.read_text().strip(), random.Random(0)
    spoilt = {module.spoil(line, rng) for _ in range(200)}
    assert len(spoilt) == 8
    for number, text in enumerate(sorted(spoilt)):
        (tmp_path / f"{number}.jsonl").write_text(text + "\n")
        report = phi3v_data.validate([tmp_path / f"{number}.jsonl"])
        assert report.counts, text


def test_validate_images_prints_ratios(tmp_path: Path) -> None:
    file = tmp_path / "images.json"
    result = CliRunner().invoke(
        load("validate_images").main, ["--rounds", "1", "--cases", "1", "--json", str(file)],
        catch_exceptions=False,
    )  # fmt: skip
    assert result.exit_code == 0
    assert re.search(r"[0-9]+\.[0-9]+ \([0-9.]+-[0-9.]+\)", result.output)
    assert json.loads(file.read_text())
