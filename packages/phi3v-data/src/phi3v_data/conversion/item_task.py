"""Convert one item, wherever that runs: in this process, in another, on another machine.

    task = ItemTask(converter, output, limit=None)       # picklable
    task(item)     # Outcome(index=17, samples=('{"id": …}',), rejections=())

An exception of the converter costs its item only: it becomes a `Rejection` with the traceback. The
machine's trouble (a full disk, no memory) is raised: it would meet every item after it.
"""

import traceback
from dataclasses import dataclass
from pathlib import Path

from phi3v_data.conversion.outputs import Output
from phi3v_data.conversion.source_copy import SourceCopy
from phi3v_data.conversion.trouble import is_machine_trouble
from phi3v_data.converters import Converter, Item, Rejected
from phi3v_data.schema import Sample

CONVERTER_ERROR = "converter_error"
"""The reason of an item whose converter raised."""

WORKER_DIED = "worker_died"
"""The reason of an item whose process did not survive it."""


@dataclass(frozen=True)
class Rejection:
    """Something that gave no sample."""

    reason: str
    detail: str

    num_before: int = 0
    """Samples that its item gave before it."""

    traceback: tuple[str, ...] = ()
    """Where the converter raised: `file:line, in function: source`, outermost first. File names
    without their folders: the same on every machine."""


@dataclass(frozen=True)
class Outcome:
    """What one item gave."""

    index: int
    """Of the item."""

    samples: tuple[str, ...]
    """As JSONL lines, without line breaks."""

    rejections: tuple[Rejection, ...]

    def first(self, num_samples: int) -> "Outcome":
        """The same, cut off after so many samples."""
        rejections = tuple(r for r in self.rejections if r.num_before < num_samples)
        return Outcome(self.index, self.samples[:num_samples], rejections)


@dataclass(frozen=True)
class ItemTask:
    """What to do with every item of a run."""

    converter: Converter
    output: Output

    limit: int | None = None
    """Most samples to take of one item."""

    source: SourceCopy | None = None
    """What must be on the machine that converts, where the source is at an address."""

    def __call__(self, item: Item) -> Outcome:
        """Convert one item.

        Raises:
            OSError, MemoryError: the machine's trouble.
        """
        if self.source is not None:
            self.source.ensure()
        samples: list[str] = []
        rejections: list[Rejection] = []
        try:
            with self.output.images() as folder:
                self._collect(item, folder, samples, rejections)
        except Exception as error:
            if is_machine_trouble(error):
                raise
            samples.clear()
            rejections.append(_rejection(error))
        if not samples and not rejections:
            rejections.append(Rejection("no_sample", "the converter gave nothing for it"))
        return Outcome(item.index, tuple(samples), tuple(rejections))

    def _collect(
        self, item: Item, folder: Path, samples: list[str], rejections: list[Rejection]
    ) -> None:
        for result in self.converter.convert(item, folder):
            if isinstance(result, Rejected):
                rejections.append(Rejection(result.reason, result.detail, len(samples)))
            elif isinstance(result, Sample):  # pyright: ignore[reportUnnecessaryIsInstance]
                samples.append(result.to_json())
                if len(samples) == self.limit:
                    return
            else:
                raise TypeError(f"convert must yield Sample or Rejected, got {result!r}")


def died(item: Item) -> Outcome:
    """The outcome of an item that took its process along."""
    detail = "the process that converted it died (a crash of the decoder, or memory)"
    return Outcome(item.index, (), (Rejection(WORKER_DIED, detail),))


def _rejection(error: Exception) -> Rejection:
    # Two frames of ours, `__call__` and `_collect`, say nothing.
    frames = traceback.extract_tb(error.__traceback__)
    frames = frames[2:] or frames
    lines = [f"{Path(f.filename).name}:{f.lineno}, in {f.name}: {f.line or ''}" for f in frames]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
    message = " ".join(str(error).split())
    detail = f"{type(error).__name__} at {where}: {message}"
    return Rejection(CONVERTER_ERROR, detail, traceback=tuple(lines))
