import io
import json
import mmap
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from phi3v_data import Sample, Turn, open_shards, write_samples, write_shards
from phi3v_data.parquet_index import ParquetWarning
from phi3v_data.shard_format import ShardError
from PIL import Image


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PHI3V_CACHE", str(cache))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return cache


def noise(width: int, height: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def make_rows(num: int = 30) -> list[dict[str, Any]]:
    """Rows as a person would build them: 0 to 3 images each."""
    rows: list[dict[str, Any]] = []
    for i in range(num):
        names = [f"train/{i}.{k}.jpg" for k in range(i % 4)]
        turn = {"images": names, "user": f"Was ist das? {i} ✓", "assistant": "a cat"}
        rows.append(
            {
                "id": f"s{i}",
                "source": "mine",
                "conversations": [turn],
                "images": [
                    {"bytes": noise(40 + i, 30 + k, 100 * i + k), "path": name}
                    for k, name in enumerate(names)
                ],
            }
        )
    return rows


def check(path: Path, rows: list[dict[str, Any]]) -> None:
    reader = open_shards(path)
    assert len(reader) == len(rows)
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    for i in order:
        row, record = rows[i], reader[i]
        assert record.sample.id == row["id"]
        assert [turn.user for turn in record.sample.conversations] == [
            turn["user"] for turn in row["conversations"]
        ]
        assert [bytes(image) for image in record.images] == [im["bytes"] for im in row["images"]]
        assert reader.image_sizes_wh(i) == tuple(
            Image.open(io.BytesIO(image["bytes"])).size for image in row["images"]
        )


def write_plain(rows: list[dict[str, Any]], path: Path, **options: Any) -> None:
    """By pyarrow, images as they are."""
    path.parent.mkdir(exist_ok=True)
    pq.write_table(
        pa.Table.from_pylist(rows), path, compression="NONE", use_dictionary=False, **options
    )


def write_by_pandas(rows: list[dict[str, Any]], path: Path) -> None:
    import pandas

    pandas.DataFrame(rows).to_parquet(path)


def write_by_polars(rows: list[dict[str, Any]], path: Path) -> None:
    import polars

    polars.DataFrame(rows).write_parquet(path)


def write_by_datasets(rows: list[dict[str, Any]], path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list(rows)
    data.cast_column("images", datasets.List(datasets.Image())).to_parquet(path)


@pytest.mark.parametrize("write", [write_by_pandas, write_by_polars])
def test_what_pandas_and_polars_write_is_read_and_the_price_is_said(write: Any, tmp_path: Path):
    rows = make_rows()
    write(rows, tmp_path / "mine.parquet")

    with pytest.warns(ParquetWarning, match=r"in random order \d+ times the bytes"):
        check(tmp_path / "mine.parquet", rows)


def test_what_datasets_writes_is_read(tmp_path: Path):
    rows = make_rows()
    write_by_datasets(rows, tmp_path / "mine.parquet")
    with warnings.catch_warnings():  # versions differ in whether they compress images
        warnings.simplefilter("ignore", ParquetWarning)
        check(tmp_path / "mine.parquet", rows)


@pytest.mark.parametrize("page_version", ["1.0", "2.0"])
def test_images_that_are_stored_as_they_are_are_mapped(page_version: str, tmp_path: Path):
    rows = make_rows()
    path = tmp_path / "mine" / "a.parquet"
    write_plain(
        rows, path, row_group_size=7, data_page_size=2000, write_batch_size=2,
        data_page_version=page_version,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(path.parent, rows)
        image = open_shards(path)[5].images[0]

    assert isinstance(image.obj, mmap.mmap)
    assert len(image.obj) == path.stat().st_size


def test_files_of_a_folder_follow_one_another_by_name(tmp_path: Path):
    rows = make_rows()
    write_plain(rows[:10], tmp_path / "mine" / "a.parquet")
    write_plain(rows[10:], tmp_path / "mine" / "b.parquet", row_group_size=6)
    check(tmp_path / "mine", rows)

    reader = open_shards(tmp_path / "mine")
    assert reader.shard_name(11) == "b.parquet"
    assert pickle.loads(pickle.dumps(reader))[11].sample.id == "s11"


def test_shards_without_their_manifest_and_index_are_indexed_again(tmp_path: Path):
    samples = [
        Sample(
            id=row["id"],
            source="mine",
            conversations=tuple(Turn(**turn) for turn in row["conversations"]),
            metadata={"frame": 3},
        )
        for row in make_rows()
    ]
    for row in make_rows():
        for image in row["images"]:
            file = tmp_path / "images" / image["path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(image["bytes"])
    write_samples(tmp_path / "train.jsonl", samples)
    write_shards([tmp_path / "train.jsonl"], tmp_path / "shards", shard_bytes=30_000, num_workers=1)
    before = [tuple(map(bytes, record.images)) for record in open_shards(tmp_path / "shards")]

    (tmp_path / "shards" / "manifest.json").unlink()
    with pytest.raises(ShardError, match=r"has no manifest\.json"):
        open_shards(tmp_path / "shards")
    (tmp_path / "shards" / "index.arrow").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = open_shards(tmp_path / "shards")

    assert [record.sample for record in again] == samples
    assert [tuple(map(bytes, record.images)) for record in again] == before


def test_the_index_is_kept_and_made_again_when_a_file_changes(tmp_path: Path, own_cache: Path):
    rows = make_rows()
    path = tmp_path / "mine" / "a.parquet"
    write_plain(rows, path)
    open_shards(path)
    (index,) = own_cache.rglob("index.arrow")
    written = index.stat().st_mtime_ns
    reader = open_shards(path)
    assert index.stat().st_mtime_ns == written

    write_plain(rows[:-1], path)
    check(path, rows[:-1])
    (other,) = own_cache.rglob("index.arrow")
    assert other != index
    with pytest.raises(ShardError, match=r"damaged: .* bytes, the manifest says"):
        _ = reader[3]
    with pytest.raises(ShardError, match="was replaced by other data"):
        pickle.loads(pickle.dumps(reader))


def test_a_damaged_index_in_the_cache_is_made_again(tmp_path: Path, own_cache: Path):
    rows = make_rows()
    path = tmp_path / "mine.parquet"
    write_plain(rows, path)
    open_shards(path)
    (manifest,) = own_cache.rglob("manifest.json")
    manifest.write_text(manifest.read_text().replace("s", "z", 1))

    check(path, rows)


def test_a_changed_image_is_named(tmp_path: Path):
    rows = make_rows()
    path = tmp_path / "mine.parquet"
    write_plain(rows, path)
    reader = open_shards(path)
    content = bytearray(path.read_bytes())
    content[content.index(rows[7]["images"][1]["bytes"]) + 100] ^= 1
    path.write_bytes(content)

    assert reader[6].sample.id == "s6"
    with pytest.raises(ShardError, match=r"row 7, sample 's7', image 2 \(train/7.1.jpg\)"):
        _ = reader[7]


def spoil_id(row: dict[str, Any]) -> None:
    row["id"] = ""


def spoil_turn(row: dict[str, Any]) -> None:
    row["conversations"][0]["user"] = None


def spoil_count(row: dict[str, Any]) -> None:
    row["images"] = row["images"][1:]


def spoil_order(row: dict[str, Any]) -> None:
    row["images"] = row["images"][::-1]


def spoil_image(row: dict[str, Any]) -> None:
    row["images"][1]["bytes"] = b"no image"


def spoil_bytes(row: dict[str, Any]) -> None:
    row["images"][1]["bytes"] = None


def repeat_id(row: dict[str, Any]) -> None:
    row["id"] = "s2"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_id, "row 7, sample '': id: String should have at least 1 character"),
        (spoil_turn, r"row 7, sample 's7': conversations\.0\.user: Field required"),
        (spoil_count, "row 7, sample 's7': its conversations name 3 images, and it has 2"),
        (spoil_order, "image 1: is 'train/7.2.jpg', and its conversations name 'train/7.0.jpg'"),
        (spoil_image, r"row 7, sample 's7', image 2 \(train/7\.1\.jpg\): "),
        (spoil_bytes, r"image 2 \(train/7\.1\.jpg\): has no bytes"),
        (repeat_id, "row 7: id 's2' was there before"),
    ],
)
def test_indexing_refuses_what_is_no_sample_and_says_where(
    spoil: Any, message: str, tmp_path: Path, own_cache: Path
):
    rows = make_rows(10)
    spoil(rows[7])
    write_plain(rows, tmp_path / "mine.parquet")
    with pytest.raises(ShardError, match=rf"mine\.parquet: .*{message}|{message}"):
        open_shards(tmp_path / "mine.parquet")

    assert not list(own_cache.rglob("*.arrow"))


def test_parquet_of_another_schema_says_what_is_expected(tmp_path: Path):
    pq.write_table(pa.table({"id": ["a"], "text": ["b"]}), tmp_path / "x.parquet")
    with pytest.raises(ShardError, match=r"no column 'source'; expected id, .*, got id, text"):
        open_shards(tmp_path / "x.parquet")
    rows = [{**row, "images": b"one"} for row in make_rows(2)]
    write_plain(rows, tmp_path / "x.parquet")
    with pytest.raises(ShardError, match=r"its images are binary; expected list<struct<bytes"):
        open_shards(tmp_path / "x.parquet")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and more that is not Parquet")
    with pytest.raises(ShardError, match=r"x\.parquet: cannot be read as Parquet"):
        open_shards(tmp_path / "x.parquet")
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(ShardError, match=r"x\.parquet: cannot be read as Parquet"):
        open_shards(tmp_path / "x.parquet")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("data")
    rows = make_rows(12)
    for row in rows:
        for image in row["images"]:
            file = folder / "images" / image["path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(image["bytes"])
    lines = [{key: row[key] for key in ("id", "source", "conversations")} for row in rows]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    write_shards([folder / "train.jsonl"], folder / "shards", shard_bytes=12_000, num_workers=1)
    return folder / "shards", rows


def files_of(shards: Path) -> list[str]:
    files = sorted(os.fspath(file) for file in shards.glob("*.parquet"))
    assert len(files) > 1
    return files


def check_foreign(seen: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    assert [row["id"] for row in seen] == [row["id"] for row in rows]
    for got, row in zip(seen, rows, strict=True):
        assert [turn["user"] for turn in got["conversations"]] == [
            turn["user"] for turn in row["conversations"]
        ]
        assert [image["bytes"] for image in got["images"]] == [
            image["bytes"] for image in row["images"]
        ]


def test_duckdb_sees_texts_and_images(shards: tuple[Path, list[dict[str, Any]]]):
    path, rows = shards
    found = duckdb.execute(
        "select id, conversations, images from read_parquet(?) order by cast(id[2:] as int)",
        [files_of(path)],
    ).fetchall()
    check_foreign(
        [dict(zip(("id", "conversations", "images"), r, strict=True)) for r in found], rows
    )


def test_pandas_sees_texts_and_images(shards: tuple[Path, list[dict[str, Any]]]):
    import pandas

    path, rows = shards
    table = pandas.concat([pandas.read_parquet(file) for file in files_of(path)])
    records: Any = table.to_dict("records")
    check_foreign(records, rows)


def test_polars_sees_texts_and_images(shards: tuple[Path, list[dict[str, Any]]]):
    import polars

    path, rows = shards
    check_foreign(polars.read_parquet(files_of(path)).to_dicts(), rows)


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_sees_texts_and_pictures(
    streaming: bool, shards: tuple[Path, list[dict[str, Any]]], tmp_path: Path
):
    import datasets

    path, rows = shards
    data: Any = datasets.load_dataset(
        "parquet",
        data_files=files_of(path),
        split="train",
        streaming=streaming,
        cache_dir=str(tmp_path / "hf"),
    )
    check_foreign(list(data), rows)
    pictures = data.cast_column("images", datasets.List(datasets.Image()))
    assert next(iter(pictures.skip(3)))["images"][2].size == (43, 32)
