"""Which class was taken for which: a matrix for machines, a table for people.

    confusion.json  {"labels": ["archery", "biking"], "counts": [[9, 1], [0, 8]], "other": [0, 2]}
    confusion.txt

    class     right     of  accuracy  taken for
    archery       9     10     90.0%  biking 1
    biking        8     10     80.0%  "running" 2
    all          17     20     85.0%

`counts[i][j]` of class i were called class j, `other[i]` something that is no class; the table has
those in quotes.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from phi3v_train.metrics import ClassCount

MOST_CLASSES = 1000
"""Different answers up to which a data set can be a classification."""

MOST_NAMED = 3
"""Wrong answers named in a line of the table."""


@dataclass(frozen=True, slots=True)
class Confusion:
    """A confusion matrix over K classes."""

    labels: tuple[str, ...]
    """Normalized answers of the data, in alphabetical order: K."""
    counts: tuple[tuple[int, ...], ...]
    """(K, K): row is the truth, column what was said."""
    other: tuple[int, ...]
    """(K,): said something that is no class."""


def is_classification(by_class: Mapping[str, ClassCount]) -> bool:
    """Whether the answers are classes: each occurs twice on average at least, none is rare text."""
    num_samples = sum(count.num_samples for count in by_class.values())
    return len(by_class) <= MOST_CLASSES and num_samples >= 2 * len(by_class)


def confusion(by_class: Mapping[str, ClassCount]) -> Confusion:
    """The matrix of `metrics.count_by_class`."""
    labels = tuple(by_class)
    counts = tuple(
        tuple(row.predicted.get(label, 0) for label in labels) for row in by_class.values()
    )
    rows = zip(by_class.values(), counts, strict=True)
    return Confusion(labels, counts, tuple(row.num_samples - sum(known) for row, known in rows))


def confusion_json(by_class: Mapping[str, ClassCount]) -> str:
    """The matrix as JSON, one row of it a line."""
    fields = asdict(confusion(by_class))
    rows = ",\n    ".join(json.dumps(row) for row in fields["counts"])
    return (
        f'{{\n  "labels": {json.dumps(fields["labels"], ensure_ascii=False)},\n'
        f'  "counts": [\n    {rows}\n  ],\n  "other": {json.dumps(fields["other"])}\n}}\n'
    )


def confusion_table(by_class: Mapping[str, ClassCount]) -> str:
    """A line a class, and one for all."""
    width = max(len("class"), len("all"), *(len(_shown(label)) for label in by_class))
    lines = [f"{'class':<{width}}  {'right':>6}  {'of':>6}  {'accuracy':>8}  taken for"]
    for label, row in by_class.items():
        wrong = [(name, count) for name, count in row.predicted.items() if name != label]
        named = [
            f"{_shown(name) if name in by_class else repr(_shown(name))} {count}"
            for name, count in wrong[:MOST_NAMED]
        ]
        named += [f"{len(wrong) - MOST_NAMED} more"] if wrong[MOST_NAMED:] else []
        lines.append(_line(_shown(label), width, row.num_correct, row.num_samples, named))
    right = sum(row.num_correct for row in by_class.values())
    total = sum(row.num_samples for row in by_class.values())
    lines.append(_line("all", width, right, total, []))
    return "\n".join(lines) + "\n"


def _line(name: str, width: int, right: int, total: int, wrong: list[str]) -> str:
    text = f"{name:<{width}}  {right:>6,}  {total:>6,}  {right / total:>8.1%}  {', '.join(wrong)}"
    return text.rstrip()


def _shown(text: str) -> str:
    """An answer of the model may be long, or break lines."""
    printable = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return printable if len(printable) <= 32 else printable[:31] + "…"
