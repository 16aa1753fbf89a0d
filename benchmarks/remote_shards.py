"""What a row of a shard on an object store costs its reader, by what is done about it.

    uv run python benchmarks/remote_shards.py --latency 30 --decode 10

    each image     one request an image, nothing kept: what fsspec alone gives
    coalesced      one request a row, nothing kept
    planned        one request a row, fetched ahead along the plan, kept
    cached         every row is in the cache
    whole shards   as cached, with the shard there as one file
    local          the same file in a local folder

The store is memory that answers each request after `--latency` milliseconds; after each row the
reader sleeps `--decode`, as if it decoded the row. What is printed is the time a reader waits for a
row: its median over the rounds, in milliseconds and as a part of `each image`'s; every side's bytes
are compared first. The sides take turns in one process.
"""

import hashlib
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import click
import fsspec
from fsspec.implementations.memory import MemoryFileSystem
from phi3v_data.remote_store import RemoteStore, StoreSettings
from phi3v_data.shard_format import ShardEntry
from phi3v_data.shard_store import LocalStore, ShardStore

IMAGES = 5
IMAGE_BYTES = 60_000

Rows = Sequence[Sequence[tuple[int, int]]]


class SlowMemory(MemoryFileSystem):
    """A store in memory with the latency of a far one."""

    protocol = "slowmemory"
    store: dict[str, Any] = {}  # noqa: RUF012 - declared so by the class above it
    latency_s: ClassVar[float] = 0.0
    num_requests: ClassVar[int] = 0

    def cat_file(self, *arguments: Any, **options: Any) -> bytes:
        """One request."""
        SlowMemory.num_requests += 1
        time.sleep(SlowMemory.latency_s)
        return super().cat_file(*arguments, **options)


def read_rows(
    store: ShardStore, entry: ShardEntry, rows: Rows, is_split: bool, decode_s: float
) -> tuple[list[float], str]:
    """Seconds waited for each row, and a hash of all bytes."""
    waited: list[float] = []
    digest = hashlib.sha256()
    for row in rows:
        begun = time.perf_counter()
        calls = [[span] for span in row] if is_split else [row]
        views = [view for spans in calls for view in store.ranges(entry, spans)]
        waited.append(time.perf_counter() - begun)
        for view in views:
            digest.update(view)
        time.sleep(decode_s)
    return waited, digest.hexdigest()


@click.command()
@click.option("--rows", "num_rows", default=200, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--latency", default=30.0, show_default=True, help="Milliseconds a request.")
@click.option("--decode", default=10.0, show_default=True, help="Milliseconds a row.")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(num_rows: int, rounds: int, latency: float, decode: float, json_path: Path | None) -> None:
    """See the module."""
    fsspec.register_implementation("slowmemory", SlowMemory, clobber=True)
    rng = random.Random(0)
    content = rng.randbytes(num_rows * IMAGES * (IMAGE_BYTES + 4))
    rows = [
        [((row * IMAGES + k) * (IMAGE_BYTES + 4) + 4, IMAGE_BYTES) for k in range(IMAGES)]
        for row in range(num_rows)
    ]
    rng.shuffle(rows)
    entry = ShardEntry(
        name="shard-00000.parquet",
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        num_samples=num_rows,
        num_images=num_rows * IMAGES,
    )
    address = "slowmemory://bench"
    fsspec.filesystem("slowmemory").pipe_file(f"{address}/{entry.name}", content)
    waits: dict[str, list[float]] = {}
    requests: dict[str, int] = {}
    digests: set[str] = set()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / entry.name).write_bytes(content)
        whole = StoreSettings(cache=folder / "whole", download="shards")
        RemoteStore(address, whole).ranges(entry, [(0, 1)])
        for number in range(rounds):
            SlowMemory.latency_s = latency / 1000
            none = StoreSettings(cache=folder / "none", limit_bytes=0)
            new = StoreSettings(cache=folder / f"new{number}")
            sides: list[tuple[str, ShardStore]] = [
                ("each image", RemoteStore(address, none)),
                ("coalesced", RemoteStore(address, none)),
                ("planned", RemoteStore(address, new)),
                ("cached", RemoteStore(address, new)),
                ("whole shards", RemoteStore(address, whole)),
                ("local", LocalStore(folder)),
            ]
            for side, store in sides:
                SlowMemory.num_requests = 0
                if side == "planned":
                    assert isinstance(store, RemoteStore)
                    store.plan((entry, row) for row in rows)
                waited, digest = read_rows(store, entry, rows, side == "each image", decode / 1000)
                store.close()
                digests.add(digest)
                waits.setdefault(side, []).append(statistics.mean(waited) * 1000)
                requests[side] = SlowMemory.num_requests
    if len(digests) != 1:
        raise click.ClickException("the sides read different bytes")

    base = statistics.median(waits["each image"])
    click.echo(
        f"{num_rows} rows of {IMAGES} images of {IMAGE_BYTES} bytes, {latency:g} ms a request, "
        f"{decode:g} ms to decode a row; fsspec {fsspec.__version__}, {os.cpu_count()} cores"
    )
    click.echo(f"{'':14}{'ms a row':>10}{'part':>10}{'requests':>10}")
    for side, times in waits.items():
        wait = statistics.median(times)
        click.echo(f"{side:14}{wait:10.3f}{wait / base:10.4f}{requests[side]:10}")
    if json_path is not None:
        json_path.write_text(json.dumps({"ms_a_row": waits, "requests": requests}, indent=1) + "\n")


if __name__ == "__main__":
    main()
