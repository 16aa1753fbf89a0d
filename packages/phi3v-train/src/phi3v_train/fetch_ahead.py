"""Shards in object stores, fetched into this machine's cache ahead of the workers that read them.

    with FetchAhead(sources, rows) as ahead:     # rows: those to come, in their order
        ...
        ahead.passed(row)                        # a worker has made it

Which worker makes which row is not known before; but all share one cache, so that the process that
has the plan can fetch for them. Directories on this disk need nothing of this.
"""

from collections.abc import Callable, Iterator, Sequence

from phi3v_data.remote_store import RemoteStore
from phi3v_data.shard_format import ShardEntry

from phi3v_train.sources import Sources

Rows = Callable[[], Iterator[Sequence[int]]]
"""Rows of sample numbers, from the first; asked for once a directory."""


class FetchAhead:
    """Follows the rows of one run.

    Args:
        sources: the shard directories.
        rows: that will be read. They are asked for as far as is fetched ahead.
    """

    def __init__(self, sources: Sources, rows: Rows) -> None:
        self._sources = sources
        self._rows = rows
        self._stores = {
            number: reader.store
            for number, reader in enumerate(sources.readers)
            if isinstance(reader.store, RemoteStore)
        }

    def __enter__(self) -> "FetchAhead":
        for number, store in self._stores.items():
            store.plan(self._spans(number))
        return self

    def __exit__(self, *_: object) -> None:
        for store in self._stores.values():
            store.close()  # ends its threads; what is asked for later opens it again

    def passed(self, row: Sequence[int]) -> None:
        """These samples have been read."""
        if self._stores:
            for number in row:
                source, place = self._sources.locate(number)
                if source in self._stores:
                    self._stores[source].passed(*self._sources.readers[source].image_spans(place))

    def _spans(self, wanted: int) -> Iterator[tuple[ShardEntry, Sequence[tuple[int, int]]]]:
        reader = self._sources.readers[wanted]
        for row in self._rows():
            for number in row:
                source, place = self._sources.locate(number)
                if source == wanted:
                    entry, spans = reader.image_spans(place)
                    if spans:
                        yield entry, spans
