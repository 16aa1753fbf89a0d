import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from phi3v_data import Sample, Turn, shard_writer, write_samples
from phi3v_data.shard_verify import verify_shards
from phi3v_data.shard_writer import write_shards
from phi3v_data.shards import Record, ShardError, open_shards
from PIL import Image


def save_noise(path: Path, width: int, height: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, quality=90)


def make_samples(root: Path, num: int = 12) -> list[Sample]:
    """`num` samples with 0 to 3 images each under `root/images`."""
    samples: list[Sample] = []
    for i in range(num):
        paths = tuple(f"train/{i}.{k}.jpg" for k in range(i % 4))
        for k, path in enumerate(paths):
            save_noise(root / "images" / path, 40 + i, 30 + k, seed=100 * i + k)
        first = Turn(images=paths, user=f"Was ist das? {i} ✓", assistant="a", answers=("a", "b"))
        turns = (first, Turn(user="And now?", assistant="nothing")) if i % 3 == 0 else (first,)
        metadata = {"frame": i, "ok": None} if i % 2 else None
        samples.append(Sample(id=f"s{i}", source="toy", conversations=turns, metadata=metadata))
    return samples


@pytest.fixture
def dataset(tmp_path: Path) -> tuple[Path, list[Sample]]:
    samples = make_samples(tmp_path)
    write_samples(tmp_path / "train.jsonl", samples)
    return tmp_path, samples


@pytest.fixture
def shards(dataset: tuple[Path, list[Sample]]) -> Path:
    root, _ = dataset
    result = write_shards([root / "train.jsonl"], root / "shards", shard_bytes=12_000)
    assert result.manifest is not None
    assert len(result.manifest.shards) > 2
    return root / "shards"


def test_records_are_the_samples_and_the_bytes_that_went_in(
    dataset: tuple[Path, list[Sample]], shards: Path
):
    root, samples = dataset
    reader = open_shards(shards)

    assert [record.sample for record in reader] == samples
    for i, record in enumerate(reader):
        files = [(root / "images" / path).read_bytes() for path in samples[i].images]
        assert [bytes(image) for image in record.images] == files
        assert reader.image_sizes_wh(i) == tuple(Image.open(io.BytesIO(f)).size for f in files)
        assert reader.image_bytes(i) == sum(map(len, files))
        assert reader.sample(i) == samples[i]


def test_the_index_alone_answers_for_texts_and_sizes(shards: Path):
    for file in shards.glob("*.parquet"):
        file.unlink()
    reader = open_shards(shards)

    assert reader.sample(3).id == "s3"
    assert reader.image_sizes_wh(3) == ((43, 30), (43, 31), (43, 32))
    with pytest.raises(ShardError, match="missing"):
        _ = reader[3]


def test_a_reader_is_a_sequence(shards: Path):
    reader = open_shards(shards)

    assert len(reader) == 12
    assert reader[-1].sample.id == "s11"
    assert [record.sample.id for record in reader[2:8:2]] == ["s2", "s4", "s6"]
    with pytest.raises(IndexError, match=r"sample 12: .* holds 12"):
        _ = reader[12]
    assert isinstance(reader[0], Record)


def test_images_are_views_of_the_file_not_copies(shards: Path):
    image = open_shards(shards)[1].images[0]

    assert isinstance(image, memoryview)
    assert image.readonly
    assert image.obj is not None
    assert len(image.obj) > len(image)  # type: ignore[arg-type]


def test_a_reader_pickles_as_its_path_and_refuses_other_data(
    dataset: tuple[Path, list[Sample]], shards: Path
):
    root, samples = dataset
    pickled = pickle.dumps(open_shards(shards))
    assert len(pickled) < 500
    assert pickle.loads(pickled)[5].sample == samples[5]

    write_samples(root / "train.jsonl", samples[:6])
    write_shards([root / "train.jsonl"], shards, overwrite=True)
    with pytest.raises(ShardError, match="replaced by other data"):
        pickle.loads(pickled)


def test_many_threads_may_read_one_reader(dataset: tuple[Path, list[Sample]], shards: Path):
    _, samples = dataset
    reader = open_shards(shards)
    rows = [row for _ in range(50) for row in range(12)]
    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(reader.__getitem__, rows))

    assert [record.sample for record in records] == [samples[row] for row in rows]


def test_bytes_and_fingerprint_are_a_function_of_the_input(
    dataset: tuple[Path, list[Sample]], shards: Path
):
    root, _ = dataset
    write_shards([root / "train.jsonl"], root / "again", shard_bytes=12_000, num_workers=1)
    names = sorted(os.listdir(shards))

    assert names == sorted(os.listdir(root / "again"))
    for name in names:
        assert (shards / name).read_bytes() == (root / "again" / name).read_bytes(), name
    assert str(root) not in (shards / "manifest.json").read_text()


def test_small_row_groups_and_pages_are_located_too(
    dataset: tuple[Path, list[Sample]], monkeypatch: pytest.MonkeyPatch
):
    root, samples = dataset
    monkeypatch.setattr(shard_writer, "ROW_GROUP_BYTES", 5_000)
    write_shards([root / "train.jsonl"], root / "out")

    assert pq.ParquetFile(root / "out" / "shard-00000.parquet").num_row_groups > 3
    assert [record.sample for record in open_shards(root / "out")] == samples
    assert verify_shards(root / "out") == []


def test_equal_images_in_a_row_are_each_found(tmp_path: Path):
    save_noise(tmp_path / "a.jpg", 20, 20, 0)
    sample = Sample(
        id="x", source="s", conversations=(Turn(images=("a.jpg",) * 40, user="u", assistant="a"),)
    )
    write_samples(tmp_path / "x.jsonl", [sample])
    write_shards([tmp_path / "x.jsonl"], tmp_path / "out")
    record = open_shards(tmp_path / "out")[0]

    assert {bytes(image) for image in record.images} == {(tmp_path / "a.jpg").read_bytes()}
    assert len(record.images) == 40


def test_more_rows_than_an_index_batch_holds(tmp_path: Path):
    samples = [
        Sample(id=str(i), source="s", conversations=(Turn(user="u" * (i % 50), assistant="a"),))
        for i in range(2500)
    ]
    write_samples(tmp_path / "x.jsonl", samples)
    write_shards([tmp_path / "x.jsonl"], tmp_path / "out")
    reader = open_shards(tmp_path / "out")

    assert [reader.sample(i) for i in range(2500)] == samples
    assert verify_shards(tmp_path / "out") == []


def test_duckdb_and_pyarrow_see_ordinary_parquet(dataset: tuple[Path, list[Sample]], shards: Path):
    root, samples = dataset
    rows = duckdb.sql(
        f"select id, conversations, images, widths, metadata from '{shards}/*.parquet' order by "
        "cast(substr(id, 2) as int)"
    )
    assert rows is not None
    rows = rows.fetchall()
    table = pq.read_table(shards / "shard-00000.parquet", page_checksum_verification=True)

    assert [row[0] for row in rows] == [sample.id for sample in samples]
    for (_, turns, images, widths, metadata), sample in zip(rows, samples, strict=True):
        assert [turn["user"] for turn in turns] == [turn.user for turn in sample.conversations]
        assert [image["path"] for image in images] == list(sample.images)
        for image, width in zip(images, widths, strict=True):
            assert Image.open(io.BytesIO(image["bytes"])).width == width
        assert (metadata and json.loads(metadata)) == sample.metadata
    assert table.column("id").to_pylist()[0] == "s0"
    assert table.column("images")[1][0]["bytes"].as_py() == (
        (root / "images" / samples[1].images[0]).read_bytes()
    )


def test_an_error_means_nothing_is_written(dataset: tuple[Path, list[Sample]]):
    root, samples = dataset
    (root / "images" / samples[7].images[1]).unlink()
    result = write_shards([root / "train.jsonl"], root / "shards")

    assert result.manifest is None
    assert result.report.counts == {"I101": 1}
    assert result.report.num_valid == 11
    assert sorted(os.listdir(root)) == ["images", "train.jsonl"]


def test_drop_invalid_counts_and_lists_what_it_leaves_out(dataset: tuple[Path, list[Sample]]):
    root, samples = dataset
    (root / "images" / samples[7].images[1]).unlink()
    with open(root / "train.jsonl", "a") as file:
        file.write("not json\n")
    result = write_shards([root / "train.jsonl"], root / "shards", drop_invalid=True)
    rejected = [json.loads(line) for line in open(root / "shards" / "rejected.jsonl")]

    assert result.manifest is not None
    assert result.manifest.num_dropped == 2
    assert result.manifest.validation.counts == {"P101": 1, "I101": 1}
    assert [(r["line"], r["findings"][0]["code"]) for r in rejected] == [(8, "I101"), (13, "P101")]
    assert rejected[1]["content"] == "not json"
    reader = open_shards(root / "shards")
    assert [record.sample for record in reader] == samples[:7] + samples[8:]
    assert verify_shards(root / "shards") == []


def test_the_same_again_is_up_to_date_and_untouched(dataset: tuple[Path, list[Sample]]):
    root, _ = dataset
    first = write_shards([root / "train.jsonl"], root / "shards")
    times = {file: file.stat().st_mtime_ns for file in (root / "shards").iterdir()}
    again = write_shards([root / "train.jsonl"], root / "shards")

    assert not first.is_up_to_date
    assert again.is_up_to_date
    assert again.manifest == first.manifest
    assert times == {file: file.stat().st_mtime_ns for file in (root / "shards").iterdir()}


def test_the_same_again_with_dropped_samples_is_up_to_date_until_one_is_repaired(
    dataset: tuple[Path, list[Sample]],
):
    root, samples = dataset
    image = root / "images" / samples[7].images[1]
    content = image.read_bytes()
    image.write_bytes(content[:100])

    def write(overwrite: bool = False) -> bool:
        jsonl, out = root / "train.jsonl", root / "shards"
        result = write_shards([jsonl], out, drop_invalid=True, overwrite=overwrite)
        return result.is_up_to_date

    assert not write()
    assert write()
    image.write_bytes(content)
    with pytest.raises(ValueError, match="other samples dropped; --overwrite"):
        write()
    assert not write(overwrite=True)
    assert len(open_shards(root / "shards")) == 12


@pytest.mark.parametrize("change", ["settings", "jsonl", "image", "file"])
def test_a_directory_from_something_else_asks_for_overwrite(
    dataset: tuple[Path, list[Sample]], change: str
):
    root, samples = dataset
    write_shards([root / "train.jsonl"], root / "shards")
    num_crops = 16
    if change == "settings":
        num_crops = 4
    elif change == "jsonl":
        write_samples(root / "train.jsonl", samples[1:])
    elif change == "image":
        save_noise(root / "images" / samples[5].images[0], 44, 44, 1)
    else:
        (root / "shards" / "shard-00000.parquet").unlink()

    with pytest.raises(ValueError, match="--overwrite replaces it"):
        write_shards([root / "train.jsonl"], root / "shards", num_crops=num_crops)
    write_shards([root / "train.jsonl"], root / "shards", overwrite=True, num_crops=num_crops)

    assert verify_shards(root / "shards") == []
    assert sorted(os.listdir(root)) == ["images", "shards", "train.jsonl"]


def test_a_directory_with_other_files_is_never_replaced(dataset: tuple[Path, list[Sample]]):
    root, _ = dataset
    (root / "home").mkdir()
    (root / "home" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"not shards \(thesis.tex"):
        write_shards([root / "train.jsonl"], root / "home", overwrite=True)

    assert (root / "home" / "thesis.tex").read_text() == "precious"


def test_a_killed_run_leaves_nothing_under_the_name_and_its_rest_is_removed(
    dataset: tuple[Path, list[Sample]],
):
    root, _ = dataset
    script = (
        "import os, sys\n"
        "from phi3v_data import write_shards\n"
        "def stop(what, done, total):\n"
        "    if what == 'writing' and done > total // 2: os._exit(9)\n"
        f"write_shards([{str(root / 'train.jsonl')!r}], {str(root / 'shards')!r}, "
        "shard_bytes=12_000, progress=stop)\n"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 9
    left = [name for name in os.listdir(root) if name.startswith(".shards.tmp-")]
    assert len(left) == 1
    assert not (root / "shards").exists()

    write_shards([root / "train.jsonl"], root / "shards")
    assert sorted(os.listdir(root)) == ["images", "shards", "train.jsonl"]


def test_two_runs_on_one_directory_do_not_meet(dataset: tuple[Path, list[Sample]]):
    root, _ = dataset

    def start_another(what: str, done: int, total: int) -> None:
        if what != "validating" or done < total:
            return
        with pytest.raises(ValueError, match="another run is writing it right now"):
            write_shards([root / "train.jsonl"], root / "shards")

    write_shards([root / "train.jsonl"], root / "shards", progress=start_another)
    assert verify_shards(root / "shards") == []


def test_ids_are_unique_among_all_files_of_a_shard_directory(dataset: tuple[Path, list[Sample]]):
    root, samples = dataset
    write_samples(root / "more.jsonl", samples[:2])
    result = write_shards([root / "train.jsonl", root / "more.jsonl"], root / "shards")

    assert result.manifest is None
    assert result.report.counts["D101"] == 2
    (first, _) = (d for d in result.report.diagnostics if d.code == "D101")
    assert "train.jsonl:1" in first.message


def test_no_samples_is_an_error(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no samples"):
        write_shards([tmp_path / "x.jsonl"], tmp_path / "out")


def test_a_folder_that_is_no_shard_directory_says_so(tmp_path: Path):
    with pytest.raises(ShardError, match=r"has no manifest\.json"):
        open_shards(tmp_path)
    with pytest.raises(ShardError, match="is not a directory"):
        open_shards(tmp_path / "nowhere")


def test_another_format_version_is_named_with_the_way_out(shards: Path):
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["version"] = 7
    (shards / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match=r"version 7, this program reads 2.*write it again"):
        open_shards(shards)


def test_a_damaged_image_is_named_on_first_read_and_by_verify(shards: Path):
    reader = open_shards(shards)
    image = reader[3].images[2]
    path = shards / reader.shard_name(3)
    content = bytearray(path.read_bytes())
    content[content.index(bytes(image)) + 50] ^= 1
    path.write_bytes(content)

    with pytest.raises(ShardError, match=r"row 3, sample 's3', image 3 \(train/3.2.jpg\)"):
        _ = open_shards(shards)[3]
    assert open_shards(shards)[2].sample.id == "s2"
    problems = [finding.problem for finding in verify_shards(shards)]
    assert len(problems) == 2
    assert "SHA-256" in problems[0]
    assert "sample 's3'" in problems[1]


def test_any_flipped_byte_is_found_and_never_yields_a_wrong_sample(
    dataset: tuple[Path, list[Sample]], shards: Path, tmp_path: Path
):
    root, samples = dataset
    files = [[(root / "images" / p).read_bytes() for p in sample.images] for sample in samples]
    random = np.random.default_rng(0)
    for name in sorted(os.listdir(shards)):
        original = (shards / name).read_bytes()
        for position in random.choice(len(original), 40, replace=False).tolist():
            content = bytearray(original)
            content[position] ^= 1 << int(random.integers(8))
            (shards / name).write_bytes(content)
            try:
                assert verify_shards(shards) != [], (name, position)
            except ShardError:
                pass
            try:
                for record, sample, images in zip(open_shards(shards), samples, files, strict=True):
                    assert record.sample == sample
                    assert [bytes(image) for image in record.images] == images
            except ShardError:
                pass
        (shards / name).write_bytes(original)
    assert verify_shards(shards) == []


@pytest.mark.parametrize("name", ["index.arrow", "shard-00001.parquet", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_cut_and_missing_files_are_found(shards: Path, name: str, damage: str):
    path = shards / name
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-10])
    if name == "manifest.json":
        with pytest.raises(ShardError, match=r"manifest\.json"):
            verify_shards(shards)
    else:
        assert [finding.file for finding in verify_shards(shards)] == [name]


def test_a_foreign_file_is_found_by_verify(shards: Path):
    shutil.copy(shards / "shard-00000.parquet", shards / "shard-00099.parquet")

    assert [finding.file for finding in verify_shards(shards)] == ["shard-00099.parquet"]
