"""What a conversion would read and give, without an output folder.

    preview = dry_run(converter, "raw")
    preview.num_items                # {"train": 9537, "test": 3783}
    preview.samples[0].sample        # the first sample, as it would be written

The first items are converted for real, into a folder that is removed again.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phi3v_data.addresses import is_address
from phi3v_data.conversion.item_task import ItemTask, Outcome, Rejection
from phi3v_data.conversion.outputs import IMAGES, LocalOutput
from phi3v_data.conversion.source_copy import SourceCopy, is_archive
from phi3v_data.convert import list_items
from phi3v_data.converters import Converter
from phi3v_data.images import ImageError, probe_image
from phi3v_data.schema import Sample

MAX_TRIED = 100
"""Items that are converted in search of samples."""


@dataclass(frozen=True)
class PreviewImage:
    """A picture of a sample."""

    name: str

    size_wh: tuple[int, int] | None
    """Pixels; None where it is no picture."""

    num_bytes: int


@dataclass(frozen=True)
class PreviewSample:
    """A sample as it would be written."""

    split: str
    sample: Sample
    images: tuple[PreviewImage, ...]


@dataclass(frozen=True)
class Preview:
    """What there is, and the first samples of it."""

    num_items: dict[str, int]
    """Split → items."""

    num_files: int
    """Different files that the items are in."""

    num_bytes: int
    """Of these files."""

    num_tried: int
    """Items that were converted for this preview."""

    samples: tuple[PreviewSample, ...]
    rejections: tuple[tuple[str, Rejection], ...]
    """Of the items that were tried: item, and what was rejected."""


def dry_run(
    converter: Converter,
    source: str | os.PathLike[str],
    *,
    splits: Sequence[str] | None = None,
    num_samples: int = 3,
) -> Preview:
    """Look at a source and convert its first items; nothing stays on disk.

    Raises:
        ValueError: the source is missing or not as the converter expects it.
    """
    if not is_address(source) and not Path(source).exists():
        raise ValueError(f"source not found: {source}; expected a folder or an archive (.tar.gz)")
    with tempfile.TemporaryDirectory(prefix="phi3v-data-") as folder:
        root = Path(source)
        if is_address(source) or is_archive(source):
            root = SourceCopy(os.fspath(source), f"{folder}/source").ensure()
        items = list_items(converter, root, splits)
        task = ItemTask(converter, LocalOutput(Path(folder) / "out"), limit=num_samples)
        samples: list[PreviewSample] = []
        rejections: list[tuple[str, Rejection]] = []
        num_tried = 0
        for item in items[:MAX_TRIED]:
            num_tried += 1
            outcome = task(item).first(num_samples - len(samples))
            samples.extend(_samples(item.split, outcome, Path(folder) / "out" / IMAGES))
            rejections.extend((item.key, rejection) for rejection in outcome.rejections)
            if len(samples) == num_samples:
                break
        paths = {item.path for item in items if Path(item.path).is_file()}
        return Preview(
            num_items=dict(Counter(item.split for item in items)),
            num_files=len(paths),
            num_bytes=sum(os.stat(path).st_size for path in paths),
            num_tried=num_tried,
            samples=tuple(samples),
            rejections=tuple(rejections),
        )


def _samples(split: str, outcome: Outcome, images: Path) -> list[PreviewSample]:
    return [
        PreviewSample(split, sample, tuple(_image(images, name) for name in sample.images))
        for sample in map(Sample.from_json, outcome.samples)
    ]


def _image(folder: Path, name: str) -> PreviewImage:
    path = folder / name
    try:
        info = probe_image(path)
    except ImageError:
        return PreviewImage(name, None, path.stat().st_size)
    return PreviewImage(name, (info.width, info.height), path.stat().st_size)
