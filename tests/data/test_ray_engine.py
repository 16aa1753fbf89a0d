import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from phi3v_data.convert import convert
from phi3v_data.converters import Converter, Item, Rejected
from phi3v_data.converters.ucf101 import Ucf101
from phi3v_data.schema import Sample

from tests.data.clips import truncate, write_tree
from tests.data.test_convert import Words, digest, write_words

# Read when ray is imported. Under `uv run`, Ray would build another environment for its workers.
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
ray: Any = pytest.importorskip("ray")

ROOT = Path(__file__).resolve().parents[2]


class Fatal(Words):
    """Kills its worker: once per item that says `once`, always for `die`."""

    def convert(self, item: Item, out_dir: Path) -> Iterator[Sample | Rejected]:
        path = Path(item.path)
        mark = path.with_suffix(".mark")
        if path.read_text() == "once" and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield from super().convert(item, out_dir)


class Slow(Words):
    """Takes its time."""

    def convert(self, item: Item, out_dir: Path) -> Iterator[Sample | Rejected]:
        time.sleep(0.05)
        yield from super().convert(item, out_dir)


@pytest.fixture(scope="module", autouse=True)
def two_workers() -> Iterator[None]:
    """One Ray of two workers for all tests; `convert` takes the one that is there."""
    sys.path.insert(0, str(ROOT))  # workers import what this process can
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    yield
    ray.shutdown()
    sys.path.remove(str(ROOT))


def on_ray(converter: Converter, source: Path, out_dir: Path, **options: Any):
    return convert(converter, source, out_dir, engine="ray", num_workers=2, **options)


def test_the_output_is_the_same_bytes_as_without_ray(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "src")
    truncate(root / "val/Biking/v_Biking_g10_c01.avi", 0.4)
    result = on_ray(Ucf101(), root, tmp_path / "ray")
    convert(Ucf101(), root, tmp_path / "local", num_workers=0)
    assert result.rejected == {"truncated": 1}
    assert digest(tmp_path / "ray") == digest(tmp_path / "local")


def test_a_worker_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    source = write_words(tmp_path / "src", "a", "once", "b", "c", "once", "d")
    result = on_ray(Fatal(), source, tmp_path / "out")
    assert (result.counts, result.rejected) == ({"train": 6}, {})


def test_an_item_that_kills_every_worker_costs_itself_only(tmp_path: Path) -> None:
    source = write_words(tmp_path / "src", "a", "die", "b")
    result = on_ray(Fatal(), source, tmp_path / "out")
    assert (result.counts, result.rejected) == ({"train": 2}, {"worker_died": 1})


def test_the_machines_trouble_stops_the_run_and_it_continues(tmp_path: Path) -> None:
    source = write_words(tmp_path / "src", "a", "b", "full")
    with pytest.raises(OSError, match="No space left"):
        on_ray(Words(), source, tmp_path / "out")
    (source / "002.txt").write_text("free")
    result = convert(Words(), source, tmp_path / "out", num_workers=0)
    assert result.counts == {"train": 3}


def test_a_limit_holds_on_ray_too(tmp_path: Path) -> None:
    source = write_words(tmp_path / "src", *(["two"] * 40))
    result = on_ray(Words(), source, tmp_path / "ray", limit=5)
    convert(Words(), source, tmp_path / "local", num_workers=0, limit=5)
    assert result.counts == {"train": 5}
    assert digest(tmp_path / "ray") == digest(tmp_path / "local")
    assert len((source / "log").read_text().split()) < 30  # back-pressure: not all 40


def test_no_cluster_at_the_address_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_words(tmp_path / "src", "a")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ValueError, match=r"cannot reach a Ray cluster at 127\.0\.0\.1:1"):
        on_ray(Words(), source, tmp_path / "out", ray_address="127.0.0.1:1")
