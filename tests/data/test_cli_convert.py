import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from phi3v_data.cli import main
from phi3v_data.jsonl import read_samples

from tests.data.clips import truncate, write_clip


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["convert", *map(str, args)])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name in ("train/Archery/a.avi", "train/Biking/b.avi", "val/Archery/c.avi"):
        write_clip(tmp_path / "src" / name)
    return tmp_path / "src"


def test_convert_prints_a_summary_and_the_next_command(source: Path, tmp_path: Path) -> None:
    result = run("ucf101", source, "--out_dir", tmp_path / "out", "--workers", 1)
    assert result.exit_code == 0, result.output
    assert "3 items" in result.output
    assert "ucf101_train.jsonl" in result.output
    assert f"Next: phi3v-data validate {tmp_path / 'out' / 'ucf101_train.jsonl'}" in result.output
    assert len(next(read_samples(tmp_path / "out/ucf101_train.jsonl")).images) == 8


def test_both_spellings_of_options_work(source: Path, tmp_path: Path) -> None:
    result = run("ucf101", source, "--out-dir", tmp_path / "out", "--num-frames", 3, "--workers", 0)
    assert result.exit_code == 0, result.output
    assert len(next(read_samples(tmp_path / "out/ucf101_val.jsonl")).images) == 3


def test_settings_reach_the_converter(source: Path, tmp_path: Path) -> None:
    options = ("--quality", 50, "--short", "reject", "--set", "num_frames=2", "--limit", 1)
    result = run("ucf101", source, "--out_dir", tmp_path / "out", "--workers", 0, *options)
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    settings = manifest["run"]["settings"]
    assert (settings["num_frames"], settings["quality"], settings["short"]) == (2, 50, "reject")
    assert manifest["run"]["limit"] == 1


def test_options_of_the_converter_are_options_of_the_command(source: Path, tmp_path: Path) -> None:
    options = ("--max_side", 32, "--sampling", "center", "--seed", 7, "--split", "train")
    result = run("ucf101", source, "--out_dir", tmp_path / "out", "--workers", 0, *options)
    assert result.exit_code == 0, result.output
    run_of = json.loads((tmp_path / "out/manifest.json").read_text())["run"]
    assert run_of["settings"]["max_side"] == 32
    assert run_of["settings"]["sampling"] == "center"
    assert run_of["settings"]["seed"] == 7
    assert run_of["splits"] == ["train"]
    assert not (tmp_path / "out/ucf101_val.jsonl").exists()


def test_options_may_stand_before_the_converter(source: Path, tmp_path: Path) -> None:
    result = run("--out_dir", tmp_path / "out", "--workers", 0, "ucf101", source)
    assert result.exit_code == 0, result.output


def test_a_dry_run_shows_samples_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    (source / "train/Archery/a.avi").write_bytes(b"")
    result = run("ucf101", source, "--dry_run", "--num_frames", 2)
    assert result.exit_code == 0, result.output
    assert "val/Archery/c.0.jpg  64x48" in result.output
    assert "user      Classify the video" in result.output
    assert "assistant Archery" in result.output
    assert "rejected (unreadable) train/Archery/a.avi" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


WORSE = """
class Worse:
    name = "worse"
    def discover(self, source):
        from phi3v_data import Item
        for index in range(3):
            yield Item(index, f"item {index}", str(source))
    def convert(self, item, out_dir):
        if item.index == 1:
            raise KeyError("label")
        from phi3v_data import Sample, Turn
        yield Sample(id=item.key, source="worse", conversations=(Turn(user="?", assistant="!"),))
"""


def test_a_converter_that_raises_is_named_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "worse_converter.py").write_text(WORSE)
    (tmp_path / "src").mkdir()
    monkeypatch.chdir(tmp_path)
    args = ("worse_converter:Worse", "src", "--out_dir", "out", "--workers", 0)
    stopped = run(*args, "--on_error", "stop")
    assert stopped.exit_code == 1
    assert "Error: item 1: KeyError at worse_converter.py:10: 'label'" in stopped.output
    assert "what is finished is kept, run again" in stopped.output
    result = run(*args)
    assert result.exit_code == 0, result.output
    assert "The converter raised, first for item 1:" in result.output
    assert 'worse_converter.py:10, in convert: raise KeyError("label")' in result.output


def test_rejected_clips_are_counted_by_reason_and_the_rest_goes_on(
    source: Path, tmp_path: Path
) -> None:
    truncate(source / "train/Archery/a.avi", 0.5)
    (source / "train/Biking/b.avi").write_bytes(b"")
    result = run("ucf101", source, "--out_dir", tmp_path / "out", "--workers", 0)
    assert result.exit_code == 0, result.output
    assert "truncated" in result.output
    assert "unreadable" in result.output
    assert "rejected.jsonl" in result.output
    assert len(list(read_samples(tmp_path / "out/ucf101_val.jsonl"))) == 1


def test_not_one_sample_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "src/train/A").mkdir(parents=True)
    (tmp_path / "src/train/A/a.avi").write_bytes(b"junk")
    result = run("ucf101", tmp_path / "src", "--out_dir", tmp_path / "out", "--workers", 0)
    assert result.exit_code == 1
    assert "Next:" not in result.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("ucf101", "nowhere", "--out_dir", "out"), "source not found: nowhere"),
        (("ucf101", "src/val", "--out_dir", "out"), "no videos found in src/val"),
        (("ufc101", "src", "--out_dir", "out"), "Did you mean 'ucf101'?"),
        (("no_module:X", "src", "--out_dir", "out"), "expected module:object"),
        (("ucf101", "src", "--out_dir", "out", "--set", "folds=1"), "has no option folds"),
        (("ucf101", "src", "--out_dir", "out", "--num_frames", "0"), "expected 1 to 1000, got 0"),
        (("ucf101", "src", "--out_dir", "out", "--quality", "101"), "expected 1 to 100, got 101"),
    ],
)
def test_a_bad_input_gets_one_line_and_writes_nothing(
    source: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(source.parent)
    result = run(*args)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.splitlines()) == 1
    assert [path.name for path in source.parent.iterdir()] == ["src"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "missing CONVERTER"),
        (("ucf101",), "missing SOURCE"),
        (("ucf101", "src"), "missing --out_dir"),
        (("ucf101", "src", "--out_dir", "out", "--set", "fold"), "expected NAME=VALUE, got 'fold'"),
        (("ucf101", "src", "--out_dir", "out", "--folds", "1"), "No such option"),
    ],
)
def test_wrong_usage_says_what_is_wrong(args: tuple[str, ...], message: str) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert message in result.output


def test_other_settings_need_overwrite(source: Path, tmp_path: Path) -> None:
    args = ("ucf101", source, "--out_dir", tmp_path / "out", "--workers", 0, "--num_frames")
    assert run(*args, 2).exit_code == 0
    refused = run(*args, 3)
    assert refused.exit_code == 2
    assert "num_frames was 2, now 3" in refused.output
    assert run(*args, 3, "--overwrite").exit_code == 0
    assert len(list((tmp_path / "out/images").rglob("*.jpg"))) == 9


def test_running_it_again_says_that_it_is_done(source: Path, tmp_path: Path) -> None:
    args = ("ucf101", source, "--out_dir", tmp_path / "out", "--workers", 0)
    run(*args)
    assert "3 items were finished by an earlier run" in run(*args).output


def write_wheel(folder: Path) -> Path:
    """A package of one module, as a wheel."""
    dist = "tiny_converters-1.0.dist-info"
    files = {
        "tiny_converters.py": WORSE.replace("class Worse:", 'class Tiny:\n    """Tiny things."""'),
        f"{dist}/METADATA": "Metadata-Version: 2.1\nName: tiny-converters\nVersion: 1.0\n",
        f"{dist}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nTag: py3-none-any\n"
        "Root-Is-Purelib: true\n",
        f"{dist}/entry_points.txt": "[phi3v_data.converters]\ntiny = tiny_converters:Tiny\n"
        "broken = tiny_converters:Missing\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{dist}/RECORD"])
    wheel = folder / "tiny_converters-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in {**files, f"{dist}/RECORD": record}.items():
            archive.writestr(name, text)
    return wheel


def test_a_converter_of_another_package_is_found_by_name(tmp_path: Path) -> None:
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not on the path")
    site = tmp_path / "site"
    install = (uv, "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site)
    subprocess.run([*install, write_wheel(tmp_path)], check=True)
    (tmp_path / "src").mkdir()

    def phi3v_data(*args: object) -> str:
        command = [Path(sys.executable).with_name("phi3v-data"), *map(str, args)]
        environment = {**os.environ, "PYTHONPATH": str(site)}
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        return done.stdout + done.stderr

    assert "tiny\ttiny_converters:Tiny" in phi3v_data("convert", "--list")
    help_text = phi3v_data("convert", "--help")
    assert "Tiny things." in help_text
    assert "converter 'broken' is installed but broken" in " ".join(help_text.split())
    assert "2" in phi3v_data("convert", "tiny", "src", "--out_dir", "out", "--workers", 1)
    assert (tmp_path / "out/worse_train.jsonl").exists()


def test_installed_converters_are_listed() -> None:
    result = run("--list")
    assert result.exit_code == 0
    assert "ucf101\tphi3v_data.converters.ucf101:Ucf101" in result.output


def test_help_of_a_converter_shows_its_options() -> None:
    output = run("docvqa", "--help").output
    assert "--images [copy|link|reencode]" in output
    assert "--dry_run" in output


def test_help_shows_an_example_and_what_comes_out() -> None:
    output = run("--help").output
    assert "phi3v-data convert ucf101 UCF101_subset --out_dir converted" in output
    assert "rejected.jsonl" in output
