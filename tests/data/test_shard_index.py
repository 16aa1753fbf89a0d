import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from phi3v_data import Sample, Turn
from phi3v_data.shard_format import IndexEntry, ShardError
from phi3v_data.shard_index import INDEX_SCHEMA, ImagePlace, IndexReader, IndexWriter

Row = tuple[Sample, int, list[ImagePlace]]


def make_rows(num: int, seed: int = 0) -> list[Row]:
    """Rows of 0 to 4 images, texts of many lengths."""
    rng = random.Random(seed)
    rows: list[Row] = []
    for i in range(num):
        places = [
            ImagePlace(
                offset=rng.randrange(1 << 40),
                length=rng.randrange(1, 1 << 33),
                width=rng.randrange(1, 1 << 16),
                height=rng.randrange(1, 1 << 16),
                xxh3_64=rng.randrange(1 << 64),
            )
            for _ in range(rng.randrange(5))
        ]
        turn = Turn(images=tuple(f"{k}.jpg" for k in range(len(places))), user="ü" * (i % 700))
        rows.append((Sample(id=f"ß{i}", source="s", conversations=(turn,)), i // 100, places))
    return rows


def write(path: Path, rows: list[Row]) -> IndexEntry:
    writer = IndexWriter(path)
    for sample, shard, places in rows:
        writer.add(sample, shard, places)
    return writer.close()


def check(index: IndexReader, row: int, expected: Row) -> None:
    sample, shard, places = expected
    assert Sample.from_json(index.sample_json(row)) == sample
    assert index.id(row) == sample.id
    assert index.shard(row) == shard
    assert index.images(row) == tuple(places)
    assert index.spans(row) == (shard, [(place.offset, place.length) for place in places])
    assert index.hashes(row) == [place.xxh3_64 for place in places]


@pytest.mark.parametrize("num", [1, 3, 1023, 1024, 1025, 2500])
def test_rows_come_back_as_they_went_in(num: int, tmp_path: Path):
    rows = make_rows(num)
    index = IndexReader(tmp_path / "i", write(tmp_path / "i", rows))
    for row in random.Random(0).sample(range(num), num):
        check(index, row, rows[row])


def test_rows_without_any_image_or_of_an_empty_batch_of_images(tmp_path: Path):
    rows: list[Row] = [(sample, shard, []) for sample, shard, _ in make_rows(1030)]
    rows = [
        (sample.model_copy(update={"conversations": (Turn(user="u"),)}), shard, [])
        for sample, shard, _ in rows
    ]
    index = IndexReader(tmp_path / "i", write(tmp_path / "i", rows))
    for row in (0, 1023, 1024, 1029):
        check(index, row, rows[row])


def test_a_table_of_rows_is_the_same_as_the_rows(tmp_path: Path):
    rows = make_rows(2100)
    one_by_one = write(tmp_path / "a", rows)
    writer = IndexWriter(tmp_path / "b")
    for start in range(0, 2100, 700):
        writer.add_table(
            pa.Table.from_pylist(
                [
                    {
                        "id": sample.id,
                        "source": sample.source,
                        "sample": sample.to_json(),
                        "shard": shard,
                        "images": [place._asdict() for place in places],
                    }
                    for sample, shard, places in rows[start : start + 700]
                ],
                schema=INDEX_SCHEMA,
            )
        )
    index = IndexReader(tmp_path / "b", writer.close())

    assert len(one_by_one.batches) == 3
    for row in range(0, 2100, 7):
        check(index, row, rows[row])


def test_a_damaged_block_is_named_and_other_blocks_are_read(tmp_path: Path):
    rows = make_rows(2500)
    entry = write(tmp_path / "i", rows)
    start, length = entry.batches[1]
    content = bytearray((tmp_path / "i").read_bytes())
    content[start + length // 2] ^= 1
    (tmp_path / "i").write_bytes(content)
    index = IndexReader(tmp_path / "i", entry)

    check(index, 5, rows[5])
    with pytest.raises(ShardError, match=r"i: damaged between bytes \d+ and \d+"):
        index.spans(1500)
    with pytest.raises(ShardError, match="damaged between bytes"):
        index.check_all()


def test_every_flipped_byte_is_refused_before_arrow_parses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = make_rows(60)
    entry = write(tmp_path / "i", rows)
    original = (tmp_path / "i").read_bytes()
    parsed: list[object] = []
    read_record_batch = pa.ipc.read_record_batch
    monkeypatch.setattr(
        pa.ipc, "read_record_batch", lambda *args: parsed.append(args) or read_record_batch(*args)
    )
    for place in random.Random(0).sample(range(len(original)), 200):
        content = bytearray(original)
        content[place] ^= 4
        (tmp_path / "i").write_bytes(content)
        with pytest.raises(ShardError, match="damaged between bytes"):
            IndexReader(tmp_path / "i", entry).spans(0)
    assert parsed == []

    (tmp_path / "i").write_bytes(original)
    check(IndexReader(tmp_path / "i", entry), 0, rows[0])
    assert len(parsed) == 1


def test_another_size_or_no_file_is_refused(tmp_path: Path):
    entry = write(tmp_path / "i", make_rows(10))
    content = (tmp_path / "i").read_bytes()
    (tmp_path / "i").write_bytes(content[:-1])
    with pytest.raises(ShardError, match=f"{len(content) - 1} bytes, the manifest says"):
        IndexReader(tmp_path / "i", entry)
    (tmp_path / "i").unlink()
    with pytest.raises(ShardError, match="missing, but the manifest names it"):
        IndexReader(tmp_path / "i", entry)


def test_many_threads_read_one_index(tmp_path: Path):
    rows = make_rows(2500)
    entry = write(tmp_path / "i", rows)
    for seed in range(3):
        index = IndexReader(tmp_path / "i", entry)
        order = random.Random(seed).sample(range(2500), 400)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(index.images, order))
        assert found == [tuple(rows[row][2]) for row in order]
