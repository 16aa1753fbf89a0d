r"""Which files of a data set's folder are its annotations, and where their pictures may be.

    pattern = re.compile(r"(train|dev)\.jsonl")
    find_annotations(source, pattern, ("", "data"), "dev.jsonl …")     # [source/data/dev.jsonl]
    roots_above(source / "data/dev.jsonl", source)                     # [source/data, source]

A folder that holds one data set is taken for it.
"""

import os
import re
from pathlib import Path

from phi3v_data.converters.rows import show_name


def find_annotations(
    source: Path, pattern: re.Pattern[str], folders: tuple[str, ...], expected: str
) -> list[Path]:
    """The annotation files of a data set, by name; empty where there is none.

    Args:
        source: the data set's folder, one that holds it, or one annotation file.
        pattern: what the whole name of an annotation file looks like.
        folders: where they may be below the data set's folder; the first that has some is it.
        expected: the layout in words, for the error.

    Raises:
        ValueError: `source` holds several data sets.
    """
    if source.is_file():
        return [source] if pattern.fullmatch(source.name) else []
    inside = sorted(p for p in source.iterdir() if p.is_dir() and not p.name.startswith("."))
    for roots in ([source], inside):
        found: dict[Path, list[Path]] = {}
        for root in roots:
            for folder in (root / name for name in folders):
                files = _matching_files(folder, pattern)
                if files:
                    found[root] = files
                    break
        if len(found) > 1:
            names = ", ".join(show_name(root.name) for root in found)
            raise ValueError(f"{source} holds several data sets ({names}); name one of: {expected}")
        if found:
            return next(iter(found.values()))
    return []


def roots_above(annotation: Path, source: Path) -> list[Path]:
    """The folders beside which the images of an annotation file may be, nearest first.

    From the file's own folder up to `source`; further only where `source` is a folder of
    annotations alone (`data`, `annotations`, `balanced`, …) or the file itself. What a row names
    must not be looked for right in these, but in image folders of known names inside them.
    """
    top = Path(os.path.abspath(source))
    if top.is_file():
        top = top.parent
    while top.name in _ANNOTATION_FOLDERS:
        top = top.parent
    folder = Path(os.path.abspath(annotation)).parent
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(top))]


_ANNOTATION_FOLDERS = ("data", "annotations", "balanced", "unbalanced")


def _matching_files(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_file()]
    return [folder / name for name in sorted(names, key=os.fsencode) if pattern.fullmatch(name)]
