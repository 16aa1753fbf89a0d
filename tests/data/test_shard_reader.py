import json
import multiprocessing
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from phi3v_data import Sample, Turn, open_shards, write_samples, write_shards
from phi3v_data.shard_store import LocalStore
from phi3v_data.shards import ShardReader, Verify
from PIL import Image

TRIALS = Path(__file__).with_name("damage_trials.py")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Sample]]:
    """40 samples of 0 to 3 images in several shards. Not to be changed."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    samples: list[Sample] = []
    for i in range(40):
        names = tuple(f"{i}.{k}.jpg" for k in range((i + 1) % 4))
        for name in names:
            pixels = rng.integers(0, 255, (10, 12, 3), dtype=np.uint8)
            (folder / "images").mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / "images" / name)
        turn = Turn(images=names, user=f"Question {i} ✓", assistant="Yes.")
        samples.append(Sample(id=f"s{i}", source="toy", conversations=(turn,)))
    write_samples(folder / "train.jsonl", samples)
    result = write_shards(
        [folder / "train.jsonl"], folder / "shards", shard_bytes=15_000, num_workers=1
    )
    assert result.manifest is not None
    assert len(result.manifest.shards) > 2
    return folder / "shards", samples


@pytest.fixture
def shards(written: tuple[Path, list[Sample]], tmp_path: Path) -> Path:
    """A copy, to be changed."""
    shutil.copytree(written[0], tmp_path / "shards")
    return tmp_path / "shards"


def damage_image(shards: Path, row: int, k: int) -> None:
    reader = open_shards(shards)
    _, spans = reader.image_spans(row)
    path = shards / reader.shard_name(row)
    content = bytearray(path.read_bytes())
    content[spans[k][0] + 30] ^= 1
    path.write_bytes(content)


def test_a_damaged_row_is_skipped_and_counted_when_asked_to(
    shards: Path, written: tuple[Path, list[Sample]]
):
    damage_image(shards, 6, 2)
    damage_image(shards, 9, 0)
    reader = open_shards(shards)
    records = [reader.try_get(i) for i in range(len(reader))]

    assert [i for i, record in enumerate(records) if record is None] == [6, 9]
    assert [record.sample for record in records if record] == [
        sample for i, sample in enumerate(written[1]) if i not in (6, 9)
    ]
    assert sorted(reader.damaged) == [6, 9]
    assert "row 6, sample 's6', image 3 (6.2.jpg): its bytes are damaged" in reader.damaged[6]
    _ = reader.try_get(6)
    assert len(reader.damaged) == 2
    with pytest.raises(IndexError, match="sample 40"):
        reader.try_get(40)


def test_a_missing_shard_costs_its_rows_and_no_others(shards: Path):
    reader = open_shards(shards)
    missing = reader.shard_name(20)
    (shards / missing).unlink()
    rows = [i for i in range(40) if reader.shard_name(i) == missing and (i + 1) % 4]
    again = open_shards(shards)
    lost = [i for i in range(40) if again.try_get(i) is None]

    assert lost == rows
    assert all(f"{missing}: missing" in again.damaged[i] for i in rows)


@pytest.mark.parametrize(("verify", "found"), [("full", [16, 17]), ("sampled", [16]), ("off", [])])
def test_verify_says_which_images_are_compared_with_their_hash(
    shards: Path, verify: Verify, found: list[int]
):
    damage_image(shards, 16, 0)
    damage_image(shards, 17, 1)
    reader = open_shards(shards, verify=verify)

    assert [i for i in range(40) if reader.try_get(i) is None] == found


def test_an_unknown_verify_is_refused(shards: Path):
    unknown: Any = "no"
    with pytest.raises(ValueError, match="expected 'full', 'sampled' or 'off', got 'no'"):
        open_shards(shards, verify=unknown)


def test_the_text_is_read_when_it_is_asked_for(written: tuple[Path, list[Sample]]):
    record = open_shards(written[0])[5]
    assert record.sample == written[1][5]
    assert record.sample is record.sample
    assert repr(record) == "Record('s5', 2 images)"


def test_a_store_may_be_given_in_place_of_a_path(written: tuple[Path, list[Sample]]):
    reader = open_shards(LocalStore(written[0]))
    again = pickle.loads(pickle.dumps(reader))

    assert reader[9].sample == again[9].sample == written[1][9]
    assert reader.path == written[0]


def test_views_stay_valid_when_the_reader_is_closed(written: tuple[Path, list[Sample]]):
    reader = open_shards(written[0])
    image = reader[9].images[0]
    before = bytes(image)
    reader.close()
    del reader

    assert bytes(image) == before


def test_a_pickled_reader_is_a_path_whatever_it_has_read(written: tuple[Path, list[Sample]]):
    reader = open_shards(written[0], verify="sampled")
    _ = list(reader)
    pickled = pickle.dumps(reader)

    assert len(pickled) < 500
    assert pickle.loads(pickled)[9].sample == written[1][9]


def test_a_forked_process_reads_with_the_reader_of_its_parent(
    written: tuple[Path, list[Sample]],
):
    reader = open_shards(written[0])
    _ = reader[3]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        tasks = [pool.apply_async(_read_id, (reader, i)) for i in range(40)]
        assert [task.get(timeout=60) for task in tasks] == [s.id for s in written[1]]


def _read_id(reader: ShardReader, row: int) -> str:
    record = reader[row]
    assert len(record.images) == (row + 1) % 4
    return record.sample.id


def test_threads_that_open_the_same_shard_at_once_get_the_same_bytes(
    written: tuple[Path, list[Sample]],
):
    expected = [[bytes(image) for image in record.images] for record in open_shards(written[0])]
    for _ in range(20):
        reader = open_shards(written[0])
        with ThreadPoolExecutor(8) as pool:
            records = list(pool.map(reader.__getitem__, range(40)))
        assert [[bytes(image) for image in record.images] for record in records] == expected


def test_opening_shards_loads_neither_the_writer_nor_the_validator(
    written: tuple[Path, list[Sample]],
):
    code = (
        "import sys\n"
        "from phi3v_data import open_shards\n"
        f"open_shards({str(written[0])!r})[1].sample\n"
        "names = ['shard_writer', 'validate', 'rules', 'remote_store', 'parquet_index']\n"
        "print([name for name in names if f'phi3v_data.{name}' in sys.modules])\n"
        "print([name for name in ('fsspec', 'PIL', 'pyarrow.parquet') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]


def test_reading_everything_takes_no_memory_of_its_own(written: tuple[Path, list[Sample]]):
    code = (
        "from pathlib import Path\n"
        "from phi3v_data import open_shards\n"
        "def anonymous():\n"
        "    lines = Path('/proc/self/smaps_rollup').read_text().splitlines()\n"
        "    return next(int(l.split()[1]) for l in lines if l.startswith('Anonymous:'))\n"
        "before = anonymous()\n"
        f"reader = open_shards({str(written[0])!r})\n"
        "records = [reader[i] for i in range(40)]\n"
        "print(anonymous() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert int(done.stdout) < 32 * 1024


def run_trials(shards: Path, num_trials: int, seed: int, *args: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, str(TRIALS), str(shards), str(seed), str(num_trials), *args],
        capture_output=True,
        text=True,
        timeout=30 + num_trials,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_whatever_is_damaged_no_row_is_wrong_and_the_interpreter_lives(shards: Path):
    counts = run_trials(shards, 300, seed=0)

    assert counts["wrong"] == 0
    assert counts["refused"] > 30
    assert counts["damaged_rows"] > 30


@pytest.mark.slow
@pytest.mark.long
def test_damage_of_any_kind_is_found_by_verify_every_time(shards: Path):
    counts = run_trials(shards, 10_000, 1, "verify")

    assert (counts["wrong"], counts["unfound"]) == (0, 0)
    assert sum(counts[kind] for kind in ("flip", "bytes", "cut", "delete", "swap")) == 10_000
