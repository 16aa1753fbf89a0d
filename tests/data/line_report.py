"""A `Report` of what `check` yields, line by line: what `validate` must come to, too."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

from phi3v_data.checked_lines import MAX_PER_RULE, Checked, missing_root
from phi3v_data.diagnostics import Diagnostic, Report
from phi3v_data.rules.rule import Rule


class ReportBuilder:
    """Counts what `check` yields, and keeps a bounded part of it."""

    def __init__(self, rules: tuple[Rule, ...]) -> None:
        self._rules = rules
        self._counts: Counter[str] = Counter()
        self._kept: list[Diagnostic] = []
        self._num_kept: Counter[str] = Counter()
        self._num_lines = 0
        self._num_valid = 0
        self._num_images = 0
        self._found_in: Counter[str] = Counter()  # file -> images found
        self._missing_in: Counter[str] = Counter()  # file -> findings of missing images
        self._first_missing: dict[str, tuple[Path, str]] = {}

    def add(self, checked: Checked) -> None:
        """Count one line."""
        self._num_lines += 1
        self._num_valid += checked.sample is not None
        self._num_images += checked.num_new_images
        self._found_in[checked.file] += sum(
            image.kind in ("ok", "undecodable") for image in checked.images
        )
        for found in checked.diagnostics:
            self._counts[found.code] += 1
            if found.code == "I101" and found.line is not None:
                self._missing_in[checked.file] += 1
                self._first_missing.setdefault(checked.file, (checked.image_root, found.message))
            if self._num_kept[found.code] < MAX_PER_RULE:
                self._num_kept[found.code] += 1
                self._kept.append(found)

    def report(self, files: list[str]) -> Report:
        """What was found. Where a file has many images and all are missing, that is one finding."""
        kept, counts = self._kept, Counter(self._counts)
        for file, num_missing in self._missing_in.items():
            if num_missing > 1 and not self._found_in[file]:
                root, first = self._first_missing[file]
                counts["I101"] -= num_missing - 1
                kept = [d for d in kept if not (d.code == "I101" and d.file == file)]
                kept.append(
                    replace(
                        missing_root(file, root),
                        message=f"none of its images is under {os.fspath(root)!r} "
                        f"({num_missing} findings); the first: {first}",
                    )
                )
        order = {file: number for number, file in enumerate(files)}
        kept = sorted(kept, key=lambda d: (order.get(d.file, 0), d.line or 0))
        return Report(
            files=tuple(files),
            num_lines=self._num_lines,
            num_valid=self._num_valid,
            num_images=self._num_images,
            counts={rule.code: counts[rule.code] for rule in self._rules if counts[rule.code]},
            diagnostics=tuple(kept),
            rules=tuple(rule.code for rule in self._rules),
            severities={rule.code: rule.severity for rule in self._rules},
        )
