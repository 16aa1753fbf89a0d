"""Several shard directories as one: numbers run through them, one directory after the other.

sources = open_sources([Source("shards/docvqa", 2.0), Source("shards/ucf101")])
len(sources)                    # 10_194 + 300
sources[10_200].sample          # the seventh sample of shards/ucf101
sources.place(10_200)           # "shards/ucf101/shard-00000.parquet"
"""

import bisect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from phi3v_data.schema import Sample
from phi3v_data.shards import Record, ShardReader, open_shards


@dataclass(frozen=True, slots=True)
class Source:
    """A shard directory and how much of it there is to be."""

    path: str | os.PathLike[str]
    weight: float | None = None
    """Its share of an epoch, relative to the others'; none: by its number of samples."""


class Sources:
    """Shard directories under one numbering. Open it with `open_sources`.

    Args:
        sources: at least one.
        readers: of each of them.
    """

    def __init__(self, sources: Sequence[Source], readers: Sequence[ShardReader]) -> None:
        assert len(sources) == len(readers) > 0
        self.sources = tuple(sources)
        self.readers = tuple(readers)
        self.starts = (0, *accumulate(len(reader) for reader in readers))
        """Number of the first sample of each, and behind them the count of all."""

    @property
    def name(self) -> str:
        """Of all, for messages."""
        return ", ".join(os.fspath(source.path) for source in self.sources)

    @property
    def sizes(self) -> list[int]:
        """Samples of each."""
        return [len(reader) for reader in self.readers]

    @property
    def weights(self) -> list[float] | None:
        """Of each; None where an epoch holds every sample once."""
        weights = [source.weight for source in self.sources if source.weight is not None]
        return weights if weights else None

    @property
    def fingerprint(self) -> str:
        """Names the data: of one directory its own, of several all of them with their weights."""
        if len(self.readers) == 1:
            return self.readers[0].fingerprint
        return ", ".join(
            reader.fingerprint + (f" x {source.weight:g}" if source.weight is not None else "")
            for source, reader in zip(self.sources, self.readers, strict=True)
        )

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, number: int) -> Record:
        source, row = self.locate(number)
        return self.readers[source][row]

    def sample(self, number: int) -> Sample:
        """A sample without its images."""
        source, row = self.locate(number)
        return self.readers[source].sample(row)

    def place(self, number: int) -> str:
        """The file that holds a sample, for messages."""
        source, row = self.locate(number)
        return f"{self.sources[source].path}/{self.readers[source].shard_name(row)}"

    def locate(self, number: int) -> tuple[int, int]:
        """(which directory, which of its samples)."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number}: {self.name} holds {len(self)}")
        source = bisect.bisect_right(self.starts, number) - 1
        return source, number - self.starts[source]


def open_sources(sources: Sequence[Source]) -> Sources:
    """Open them all.

    Raises:
        ValueError: one is not a shard directory, there is none, or only some have a weight.
    """
    if not sources:
        raise ValueError("expected at least one shard directory, got none")
    without = [os.fspath(source.path) for source in sources if source.weight is None]
    if 0 < len(without) < len(sources):
        raise ValueError(
            f"{', '.join(without)} has no weight and others have one; give every source a weight, "
            "or none of them"
        )
    return Sources(sources, [open_shards(source.path) for source in sources])
