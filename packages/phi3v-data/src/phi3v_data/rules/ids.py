"""D: across samples, what an earlier line tells of a later one."""

from collections.abc import Iterator

from phi3v_data.diagnostics import Label
from phi3v_data.rules.rule import Context, Finding
from phi3v_data.schema import Sample


def duplicate_id(sample: Sample, context: Context) -> Iterator[Finding]:
    """An id occurs twice.

    Ids name samples in every message, prediction and seed; they are unique within a file, and
    among files written to shards together.
    """
    if sample.id in context.ids:
        file, line_number = context.ids[sample.id]
        place = f"line {line_number}" if file == context.file else f"{file}:{line_number}"
        first = Label("first used here", file, line_number, "/id")
        yield Finding(f"id {sample.id!r} is already used: {place}", "", "/id", labels=(first,))
