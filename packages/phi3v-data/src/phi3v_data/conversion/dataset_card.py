"""`dataset_card.md`: what a converted data set is, for the people who get it.

    facts = CardFacts(converter, identity, splits=["train", "val"])
    facts.add_sample("train", '{"id": …}')
    render_card(facts)         # Markdown, with the header that the Hugging Face hub reads

The same bytes for the same data: no date, no path of this machine.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from phi3v_data.converters import About, Converter, Item
from phi3v_data.converters.rows import show_name

CARD = "dataset_card.md"

MAX_CARD_LABELS = 200
"""A data set with more different answers has no table of classes on its card."""

MAX_SHOWN = 30
"""Labels in the table; the rest is a sum."""

MAX_HASHED = 64
"""More source files than this (clips, not annotations) are not read again for their hashes."""


class _Turn(msgspec.Struct):
    images: list[str] = []
    assistant: str | None = None


class _Sample(msgspec.Struct):
    conversations: list[_Turn]


_decoder = msgspec.json.Decoder(_Sample)


@dataclass
class _Split:
    num_samples: int = 0
    num_turns: int = 0
    num_images: int = 0
    num_unanswered: int = 0

    labels: Counter[str] | None = field(default_factory=Counter[str])
    """Answers; None where there are too many to be classes."""


@dataclass
class CardFacts:
    """What a card says, gathered while the output is written."""

    converter: Converter

    identity: dict[str, Any]
    """Of the run: settings, version."""

    splits: Sequence[str]

    rejected: Counter[str] = field(default_factory=Counter[str])

    def __post_init__(self) -> None:
        self.of: dict[str, _Split] = {split: _Split() for split in self.splits}
        self.sources: list[tuple[str, int, str]] = []
        self.source_files = 0
        self.source_bytes = 0

    @property
    def num_samples(self) -> int:
        """Of all splits."""
        return sum(split.num_samples for split in self.of.values())

    @property
    def counts(self) -> dict[str, int]:
        """Split → samples."""
        return {name: split.num_samples for name, split in self.of.items()}

    def add_sample(self, split: str, line: str) -> list[str]:
        """Count a sample; return its images."""
        found, turns = self.of[split], _decoder.decode(line).conversations
        found.num_samples += 1
        found.num_turns += len(turns)
        images = [image for turn in turns for image in turn.images]
        found.num_images += len(images)
        for turn in turns:
            if turn.assistant is None:
                found.num_unanswered += 1
            elif found.labels is not None:
                found.labels[turn.assistant] += 1
                if len(found.labels) > MAX_CARD_LABELS:
                    found.labels = None
        return images

    def add_sources(self, items: Iterable[Item]) -> None:
        """Note the files that the items came from; few are hashed, of many the sizes must do."""
        paths = [
            path for path in dict.fromkeys(item.path for item in items) if Path(path).is_file()
        ]
        self.source_files = len(paths)
        self.source_bytes = sum(os.stat(path).st_size for path in paths)
        if 0 < len(paths) <= MAX_HASHED:
            root = os.path.commonpath([str(Path(path).parent) for path in paths])
            for path in paths:
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                name = show_name(Path(path).relative_to(root).as_posix())
                self.sources.append((name, os.stat(path).st_size, digest))


def render_card(facts: CardFacts) -> str:
    """The card as Markdown."""
    about: About | None = getattr(facts.converter, "about", None)
    name, identity = facts.converter.name, facts.identity
    title = about.title if about else name
    parts = [
        _front_matter(title, name, facts.splits),
        f"# {title}, as conversations",
        f"Written by phi3v-data {identity['phi3v_data']}, converter `{name}`"
        + (f", from [{about.title}]({about.homepage})." if about else "."),
        _render_splits(name, facts),
        *_render_labels(facts),
        *_render_rejected(facts),
        _render_source(facts),
        _render_settings(facts),
        "## License\n\n"
        + (
            about.license
            if about
            else "That of the source; nothing here says which. Look it up before you share this."
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(title: str, name: str, splits: Sequence[str]) -> str:
    files = "\n".join(
        f"      - split: {split.replace('-', '_')}\n        path: {name}_{split}.jsonl"
        for split in splits
    )
    return (
        f"---\npretty_name: {_quoted(title)}\nlicense: other\n"
        "task_categories:\n  - visual-question-answering\n"
        f"configs:\n  - config_name: default\n    data_files:\n{files}\n---"
    )


def _render_splits(name: str, facts: CardFacts) -> str:
    rows = [
        (
            split,
            f"`{name}_{split}.jsonl`",
            f.num_samples,
            f.num_turns,
            f.num_images,
            f.num_unanswered,
        )
        for split, f in facts.of.items()
    ]
    header = ("split", "file", "samples", "turns", "images", "without answer")
    if not any(row[-1] for row in rows):
        return "## Splits\n\n" + _table(header[:-1], [row[:-1] for row in rows])
    return "## Splits\n\n" + _table(header, rows)


def _render_labels(facts: CardFacts) -> list[str]:
    counters = [(split, found.labels) for split, found in facts.of.items()]
    known = [(split, labels) for split, labels in counters if labels]
    total: Counter[str] = Counter()
    for _, labels in known:
        total.update(labels)
    is_repeated = sum(total.values()) >= 2 * len(total)
    if not total or len(known) < sum(bool(f.num_samples) for f in facts.of.values()):
        return []
    if not is_repeated or len(total) > MAX_CARD_LABELS:
        return []
    ordered = sorted(total, key=lambda label: (-total[label], label))
    rows = [
        (_cell(label), *(labels[label] for _, labels in known)) for label in ordered[:MAX_SHOWN]
    ]
    rest = ordered[MAX_SHOWN:]
    if rest:
        sums = (sum(labels[label] for label in rest) for _, labels in known)
        rows.append((f"{len(rest)} others", *sums))
    header = ("answer", *(split for split, _ in known))
    return [f"## Label balance\n\n{len(total)} different answers.\n\n" + _table(header, rows)]


def _render_rejected(facts: CardFacts) -> list[str]:
    if not facts.rejected:
        return []
    rows = sorted(facts.rejected.items(), key=lambda pair: (-pair[1], pair[0]))
    return [
        "## Rejected\n\nEach is listed in `rejected.jsonl`.\n\n" + _table(("reason", "count"), rows)
    ]


def _render_source(facts: CardFacts) -> str:
    identity = facts.identity
    lines = [f"{facts.source_files:,} files, {facts.source_bytes:,} bytes."]
    if identity["source"]:
        lines.append(f"As it came: `{identity['source']}`.")
    if facts.sources:
        rows = [(_cell(name), size, f"`{digest}`") for name, size, digest in facts.sources]
        lines.append(_table(("file", "bytes", "SHA-256"), rows))
    else:
        lines.append(f"SHA-256 of their names and sizes: `{identity['listing']}`.")
    return "## Source\n\n" + "\n\n".join(lines)


def _render_settings(facts: CardFacts) -> str:
    settings = dict(facts.identity["settings"])
    for name in ("splits", "limit"):
        if facts.identity[name] is not None:
            settings[name] = facts.identity[name]
    if not settings:
        return "## Settings\n\nNone."
    rows = [(name, _cell(msgspec.json.encode(value).decode())) for name, value in settings.items()]
    return "## Settings\n\n" + _table(("setting", "value"), rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    for row in rows:
        cells = (f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row)
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def _cell(text: str) -> str:
    """Text that stays in its cell of a table."""
    shown = " ".join(text.split())
    shown = shown if len(shown) <= 80 else shown[:79] + "…"
    return shown.replace("\\", "\\\\").replace("|", "\\|").replace("`", "\\`").replace("<", "&lt;")


def _quoted(text: str) -> str:
    """A JSON string is a YAML string."""
    return msgspec.json.encode(text).decode()
