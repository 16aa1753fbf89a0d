"""Shards in object stores are in the cache before a worker asks for them."""

import time
from pathlib import Path

import fsspec  # pyright: ignore[reportMissingTypeStubs]
import numpy as np
import pytest
from phi3v_data import write_shards
from phi3v_data.remote_store import RemoteStore, StoreSettings
from phi3v_data.shards import open_shards
from phi3v_train.fetch_ahead import FetchAhead
from phi3v_train.sources import Source, Sources
from PIL import Image

NUM_SAMPLES = 12


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sources:
    """Samples with an image of about 12 kB each, in the memory of this process."""
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    lines: list[str] = []
    (tmp_path / "images").mkdir()
    for number in range(NUM_SAMPLES):
        pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
        turn = f'{{"images":["{number}.png"],"user":"q","assistant":"a{number}"}}'
        lines.append(f'{{"id":"{number}","source":"s","conversations":[{turn}]}}\n')
    (tmp_path / "x.jsonl").write_text("".join(lines))
    write_shards([tmp_path / "x.jsonl"], tmp_path / "shards")
    store = fsspec.filesystem("memory")
    for file in (tmp_path / "shards").iterdir():
        store.pipe_file(f"/ahead/{tmp_path.name}/{file.name}", file.read_bytes())
    address = f"memory://ahead/{tmp_path.name}"
    reader = open_shards(RemoteStore(address, StoreSettings(prefetch_bytes=40_000)))
    return Sources([Source(address)], [reader])


def cached_bytes(tmp_path: Path, least: int) -> int:
    """Bytes of images in the cache, when there are `least` or some seconds are over."""
    end = time.monotonic() + 20
    while True:
        files = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
        found = sum(p.stat().st_size for p in files if 10_000 < p.stat().st_size < 20_000)
        if found >= least or time.monotonic() > end:
            return found
        time.sleep(0.02)


def test_what_comes_next_is_fetched_and_no_more_than_that(sources: Sources, tmp_path: Path) -> None:
    rows = [[number] for number in range(NUM_SAMPLES)]
    size = sources.readers[0].image_bytes(0)
    with FetchAhead(sources, lambda: iter(rows)) as ahead:
        few = cached_bytes(tmp_path, least=3 * size)
        assert 2 * size < few < 5 * size
        for row in rows[:6]:
            ahead.passed(row)
        # Three were there; of the next three those that were passed before their turn are not
        # fetched; then come three more.
        assert cached_bytes(tmp_path, least=int(5.5 * size)) >= 5.5 * size


def test_a_directory_on_this_disk_needs_nothing_of_it(sources: Sources, tmp_path: Path) -> None:
    reader = open_shards(tmp_path / "shards")
    local = Sources([Source(tmp_path / "shards")], [reader])
    with FetchAhead(local, lambda: iter([[0]])) as ahead:
        ahead.passed([0])
    assert not (tmp_path / "cache").exists() or cached_bytes(tmp_path, least=0) == 0
