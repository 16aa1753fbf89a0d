"""A function of one file as a converter.

    def caption(path: Path, out_dir: Path, *, prompt: str = "Describe it.") -> Iterator[Sample]:
        image = write_image(out_dir, f"{path.stem}.jpg", path.with_suffix(".jpg").read_bytes())
        turn = Turn(images=(image,), user=prompt, assistant=path.read_text())
        yield Sample(id=path.stem, source="captions", conversations=(turn,))

    convert(caption, "raw", "converted")                              # every file is an item
    convert(FunctionConverter(caption, files="*.txt"), "raw", …)      # only these

The output is named after the function. Files below a folder named train, val, dev, test (or a like
name) make that split; all others are training.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

from phi3v_data.converters import Converter, Item, Rejected
from phi3v_data.schema import Sample

Function: TypeAlias = Callable[..., "Iterable[Sample | Rejected]"]
"""`(path, out_dir, **settings)` to samples."""

AnyConverter: TypeAlias = Converter | Function
"""What `convert` takes."""

SPLITS = ("train", "val", "valid", "validation", "dev", "test")
"""Folders that make a split."""

PATTERN = "**/*"
"""Every file."""


@dataclass(frozen=True)
class FunctionConverter:
    """A function of one file; see the top of this module."""

    function: Function

    files: str = PATTERN
    """The files it gets, as a pattern below the source: `*.txt`, `**/*.json`."""

    settings: Mapping[str, object] = field(default_factory=dict[str, object])
    """What else it gets, by name."""

    @property
    def name(self) -> str:
        """Output files are named after it."""
        return self.function.__name__

    def discover(self, source: Path) -> Iterator[Item]:
        """Yield one item a file, in the order of paths.

        Raises:
            ValueError: there is no such file.
        """
        root = source if source.is_dir() else source.parent
        found = sorted(source.glob(self.files)) if source.is_dir() else [source]
        index = 0
        for path in found:
            name = path.relative_to(root)
            if path.is_file() and not any(part.startswith(".") for part in name.parts):
                split = name.parts[0] if name.parts[0] in SPLITS and len(name.parts) > 1 else None
                yield Item(index, name.as_posix(), str(path), split=split or "train")
                index += 1
        if not index:
            raise ValueError(f"no file matches {self.files!r} in {source}")

    def convert(self, item: Item, out_dir: Path) -> Iterator[Sample | Rejected]:
        """Yield what the function gives for one file."""
        yield from self.function(Path(item.path), out_dir, **self.settings)


def as_converter(converter: AnyConverter) -> Converter:
    """A converter as it is; a function as one.

    Raises:
        ValueError: it is neither.
    """
    if is_function(converter):
        return FunctionConverter(cast("Function", converter))
    if not isinstance(converter, Converter):
        raise ValueError(
            "expected a converter (`name`, `discover(source)`, `convert(item, out_dir)`) or a "
            f"function of (path, out_dir), got {type(converter).__name__}"
        )
    return converter


def is_function(value: object) -> bool:
    """Whether it is a function or a method, possibly with some arguments bound."""
    return inspect.isroutine(value) or isinstance(value, functools.partial)


def settings_of(function: Function) -> dict[str, inspect.Parameter]:
    """The arguments of a function besides the file and the output folder, by name.

    Raises:
        ValueError: it does not take those two first.
    """
    parameters: list[Any] = list(inspect.signature(function).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2:
        raise ValueError(
            f"expected a function of (path, out_dir), got {getattr(function, '__name__', function)}"
            f"{inspect.signature(function)}"
        )
    return {p.name: p for p in parameters if p not in positional[:2]}
