"""Shards are made of what `validate` lets through: by any number of workers, and in any number of
runs, the same bytes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from phi3v_data import Sample, Turn, open_shards, validate, write_samples
from phi3v_data.diagnostics import Report
from phi3v_data.shard_verify import verify_shards
from phi3v_data.shard_writer import ShardResult, write_shards
from phi3v_data.validate_config import ValidateConfig
from PIL import Image

SHARD_BYTES = 20_000


def make_data(root: Path, num: int = 60) -> Path:
    """`num` samples of two noisy pictures each."""
    (root / "images").mkdir(parents=True)
    samples: list[Sample] = []
    for i in range(num):
        for k in range(2):
            pixels = np.random.default_rng(2 * i + k).integers(0, 255, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / f"{i}.{k}.jpg", quality=90)
        turn = Turn(images=(f"{i}.0.jpg", f"{i}.1.jpg"), user=f"What is {i}?", assistant="a")
        samples.append(Sample(id=f"s{i}", source="toy", conversations=(turn,)))
    write_samples(root / "train.jsonl", samples)
    return root / "train.jsonl"


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return make_data(tmp_path / "data")


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def write(jsonl: Path, out_dir: Path, num_workers: int = 1) -> ShardResult:
    return write_shards([jsonl], out_dir, shard_bytes=SHARD_BYTES, num_workers=num_workers)


def test_bytes_do_not_depend_on_the_number_of_workers(jsonl: Path, tmp_path: Path):
    result = write(jsonl, tmp_path / "one", num_workers=1)
    write(jsonl, tmp_path / "three", num_workers=3)

    assert result.manifest is not None
    assert len(result.manifest.shards) > 5
    assert content(tmp_path / "one") == content(tmp_path / "three")
    assert verify_shards(tmp_path / "three") == []


# --- one verdict


FAULTS = {
    "cut off": b'{"id": "x", "source": "toy", "conversations": [{"user": "u", "assistant',
    "missing image": b'{"id":"x","source":"toy","conversations":[{"images":["no.jpg"],'
    b'"user":"u","assistant":"a"}]}\n',
    "blank line": b'\n{"id":"x","source":"toy","conversations":[{"user":"u","assistant":"a"}]}\n',
    "repeated id": b'{"id":"s3","source":"toy","conversations":[{"user":"u","assistant":"a"}]}\n',
    "special token": b'{"id":"x","source":"toy","conversations":[{"user":"<|end|>",'
    b'"assistant":"a"}]}\n',
    "not UTF-8": b'{"id":"\xff","source":"toy","conversations":[{"user":"u","assistant":"a"}]}\n',
}


def verdict(report: Report) -> tuple[object, ...]:
    return report.counts, report.num_valid, report.num_lines, report.diagnostics, report.rules


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("drop_invalid", [False, True])
def test_the_verdict_is_that_of_validate(
    jsonl: Path, tmp_path: Path, fault: str, drop_invalid: bool
):
    with open(jsonl, "ab") as file:
        file.write(FAULTS[fault])
    report = validate([jsonl])
    result = write_shards([jsonl], tmp_path / "out", drop_invalid=drop_invalid)

    assert verdict(result.report) == verdict(report)
    assert (result.manifest is not None) == (drop_invalid or report.exit_status == 0)
    if result.manifest is not None:
        assert result.manifest.num_samples == report.num_valid
        assert result.manifest.validation.counts == report.counts
        assert result.manifest.validation.severities == report.severities
        assert result.manifest.validation.is_complete
        assert result.manifest.num_dropped == report.num_lines - report.num_valid


def test_a_missing_image_root_is_one_finding_and_drops_the_samples_with_images(
    jsonl: Path, tmp_path: Path
):
    with open(jsonl, "ab") as file:
        file.write(FAULTS["blank line"])
    (tmp_path / "empty").mkdir()
    result = write_shards([jsonl], tmp_path / "out", images=tmp_path / "empty", drop_invalid=True)
    rejected = [json.loads(line) for line in open(tmp_path / "out" / "rejected.jsonl")]

    assert verdict(result.report) == verdict(validate([jsonl], images=tmp_path / "empty"))
    assert [record.sample.id for record in open_shards(tmp_path / "out")] == ["x"]
    assert len(rejected) == 60
    assert {line["findings"][0]["code"] for line in rejected} == {"I101"}


def test_every_line_left_out_has_its_reason_however_many_there_are(tmp_path: Path):
    def line(number: int, answer: str, id: str = "") -> str:
        turn = {"user": f"u{number}", "assistant": answer}
        return json.dumps({"id": id or f"s{number}", "source": "s", "conversations": [turn]})

    lines = [line(number, " ") for number in range(150)]
    lines += [line(number, "a", id="same") for number in range(150, 300)]
    lines += ["not json"] * 150
    (tmp_path / "x.jsonl").write_text("\n".join(lines) + "\n")
    result = write_shards([tmp_path / "x.jsonl"], tmp_path / "out", drop_invalid=True)
    rejected = [json.loads(line) for line in open(tmp_path / "out" / "rejected.jsonl")]

    assert result.manifest is not None
    assert result.manifest.num_samples == 1
    assert len(rejected) == 449
    found = [[f["code"] for f in line["findings"] if f["severity"] == "error"] for line in rejected]
    assert found == [["T101"]] * 150 + [["D101"]] * 149 + [["P101"]] * 150


def test_errors_about_the_data_set_as_a_whole_cannot_be_dropped(jsonl: Path, tmp_path: Path):
    Image.new("RGB", (40, 40)).save(jsonl.parent / "images" / "unused.png")
    rules_for = ValidateConfig(severity={"I110": "error"}).rules_for
    result = write_shards([jsonl], tmp_path / "out", rules_for=rules_for, drop_invalid=True)

    assert result.manifest is None
    assert [found.code for found in result.undroppable] == ["I110"]
    assert os.listdir(tmp_path) == ["data"]


def test_what_no_rule_that_ran_objects_to_is_refused_where_it_cannot_be_stored(
    jsonl: Path, tmp_path: Path
):
    image = jsonl.parent / "images" / "3.1.jpg"
    image.rename(tmp_path / "elsewhere.jpg")
    with pytest.raises(ValueError, match=r"train\.jsonl:4: image '3\.1\.jpg'.* rules I run"):
        write_shards([jsonl], tmp_path / "out", select=["S"])
    (tmp_path / "elsewhere.jpg").rename(image)
    with open(jsonl, "ab") as file:
        file.write(b"not json\n")
    with pytest.raises(ValueError, match=r"train\.jsonl:61: no rule that ran .* rules P and S run"):
        write_shards([jsonl], tmp_path / "out", ignore=["P", "S"])
    dropped = write_shards([jsonl], tmp_path / "dropped", ignore=["P", "S"], drop_invalid=True)
    rejected = json.loads((tmp_path / "dropped" / "rejected.jsonl").read_text())
    assert dropped.manifest is not None
    assert rejected["content"] == "not json"
    assert "no rule that ran says so" in rejected["findings"][0]["message"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["image", "image of the same size", "jsonl"])
def test_what_changes_between_the_passes_is_named_and_nothing_is_written(
    jsonl: Path, tmp_path: Path, change: str
):
    def meddle(what: str, done: int, total: int) -> None:
        if what != "writing" or done:
            return
        image = jsonl.parent / "images" / "7.1.jpg"
        if change == "image":
            image.write_bytes(image.read_bytes() + b"more")
        elif change == "image of the same size":
            image.write_bytes(image.read_bytes()[:-3] + b"end")
        else:
            jsonl.write_bytes(jsonl.read_bytes().replace(b"What is 7?", b"What is 8?"))

    name = "train.jsonl" if change == "jsonl" else "7.1.jpg"
    with pytest.raises(ValueError, match=rf"{name}: changed while .*; run again"):
        write_shards([jsonl], tmp_path / "out", num_workers=1, progress=meddle)
    assert not (tmp_path / "out").exists()
    assert write_shards([jsonl], tmp_path / "out").manifest is not None


# --- runs that end early

SCRIPT = """
import sys
from phi3v_data.shard_writer import write_shards
if __name__ == "__main__":
    write_shards([sys.argv[1]], sys.argv[2], shard_bytes=20_000, num_workers=int(sys.argv[3]))
"""


def start(jsonl: Path, out_dir: Path, num_workers: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", SCRIPT, str(jsonl), str(out_dir), str(num_workers)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def kill_and_go_on(jsonl: Path, tmp_path: Path, num_kills: int, seed: int) -> None:
    """Kill a run some times at random moments; what comes out at last is what must."""
    write(jsonl, tmp_path / "expected")
    rng = random.Random(seed)
    work = tmp_path / ".out.tmp-shards"
    for _ in range(num_kills):
        process = start(jsonl, tmp_path / "out", num_workers=2)
        wanted = rng.randint(0, 8)  # shards that are finished before the blow
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(work.glob("done/*.json"))) >= wanted:
                break
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        if (tmp_path / "out").exists():  # it was faster
            assert content(tmp_path / "out") == content(tmp_path / "expected")
            shutil.rmtree(tmp_path / "out")
    result = write(jsonl, tmp_path / "out", num_workers=2)

    assert not result.is_up_to_date
    assert content(tmp_path / "out") == content(tmp_path / "expected")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "expected", "out"]


def test_a_run_killed_at_random_moments_goes_on_to_the_same_bytes(jsonl: Path, tmp_path: Path):
    kill_and_go_on(jsonl, tmp_path, num_kills=3, seed=0)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 4))
def test_many_kills_make_no_difference(tmp_path: Path, seed: int):
    kill_and_go_on(make_data(tmp_path / "data", 200), tmp_path, num_kills=10, seed=seed)


def stop_after(num_shards: int):
    """A progress that presses Ctrl-C once so many shards are written."""
    calls: list[int] = []

    def progress(what: str, done: int, total: int) -> None:
        if what == "writing":
            calls.append(done)
            if len(calls) > num_shards:
                raise KeyboardInterrupt

    return progress


def test_ctrl_c_says_what_is_kept_and_the_next_run_goes_on_with_it(jsonl: Path, tmp_path: Path):
    write(jsonl, tmp_path / "expected")
    with pytest.raises(KeyboardInterrupt, match=r"3 of \d+ shards are written and kept"):
        write_shards(
            [jsonl],
            tmp_path / "out",
            shard_bytes=SHARD_BYTES,
            num_workers=1,
            progress=stop_after(3),
        )
    assert not (tmp_path / "out").exists()
    result = write(jsonl, tmp_path / "out")

    assert result.num_kept == 3
    assert content(tmp_path / "out") == content(tmp_path / "expected")


@pytest.mark.parametrize("damage", ["shard", "index", "journal", "image", "other settings"])
def test_what_a_run_left_is_not_believed_when_it_does_not_match(
    jsonl: Path, tmp_path: Path, damage: str
):
    with pytest.raises(KeyboardInterrupt):
        write_shards(
            [jsonl],
            tmp_path / "out",
            shard_bytes=SHARD_BYTES,
            num_workers=1,
            progress=stop_after(3),
        )
    work = tmp_path / ".out.tmp-shards"
    shard_bytes, num_kept = SHARD_BYTES, 2
    if damage == "image":
        pixels = np.random.default_rng(999).integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(jsonl.parent / "images" / "0.0.jpg", quality=90)
    elif damage == "other settings":
        shard_bytes, num_kept = 50_000, 0
    else:
        names = {
            "shard": "whole/shard-00001.parquet",
            "index": "done/shard-00001.parquet.index",
            "journal": "done/shard-00001.parquet.json",
        }
        path = work / names[damage]
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 255
        path.write_bytes(damaged)
    result = write_shards([jsonl], tmp_path / "out", shard_bytes=shard_bytes, num_workers=1)

    assert result.num_kept == num_kept
    assert verify_shards(tmp_path / "out") == []
    write_shards([jsonl], tmp_path / "fresh", shard_bytes=shard_bytes, num_workers=1)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_workers_end_when_their_parent_is_killed(jsonl: Path, tmp_path: Path):
    process = start(jsonl, tmp_path / "out", num_workers=2)
    work = tmp_path / ".out.tmp-shards" / "done"
    deadline = time.monotonic() + 60
    while process.poll() is None and not list(work.glob("*")) and time.monotonic() < deadline:
        time.sleep(0.001)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = [int(pid) for pid in children.read_text().split()] if process.poll() is None else []
    process.kill()
    process.communicate(timeout=60)
    while any(is_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.01)

    assert not any(is_alive(pid) for pid in workers)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_file_given_twice_is_refused(jsonl: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="is given twice"):
        write_shards([jsonl, jsonl], tmp_path / "out")
    assert os.listdir(tmp_path) == ["data"]
