"""Converters: what turns one raw data set into samples, and how to find one.

A converter is a small object that knows a format and nothing else:

    class Captions:
        name = "captions"

        def discover(self, source: Path) -> Iterator[Item]:
            for index, path in enumerate(sorted(source.glob("*.txt"))):
                yield Item(index, key=path.name, path=str(path))

        def convert(self, item: Item, out_dir: Path) -> Iterator[Sample | Rejected]:
            path = Path(item.path)
            if path.stat().st_size == 0:
                yield Rejected("no_caption", "the text file is empty")
            else:
                image = path.with_suffix(".jpg")
                name = write_image(out_dir, image.name, image.read_bytes())
                turn = Turn(images=(name,), user="Describe it.", assistant=path.read_text())
                yield Sample(id=item.key, source=self.name, conversations=(turn,))

`phi3v_data.convert(Captions(), source, out_dir)` gives it processes, progress, resume, order and
atomic output. Where every file is an item, a function will do: see `function_converter`. Built-in
converters use the same door: the entry point group `phi3v_data.converters`.
"""

import difflib
import errno
import hashlib
import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from phi3v_data.atomic import TEMPORARY_MARK
from phi3v_data.schema import Sample

GROUP = "phi3v_data.converters"
"""The entry point group under which packages offer converters."""


@dataclass(frozen=True, order=True)
class Item:
    """One unit of work: a clip, a page, a group of rows. Picklable; sorts in output order."""

    index: int
    """Position in the output, from 0; unique. A rejected item leaves a gap."""

    key: str
    """A name for messages, stable across runs and unique, for example
    `train/Archery/v_Archery_g01_c01.avi`."""

    path: str
    """The file it is read from; its size is part of what a resumed run must find unchanged."""

    split: str = "train"
    """Names the output file: `<converter>_<split>.jsonl`."""

    payload: Any = field(default=None, compare=False)
    """Whatever else `convert` needs to know, picklable."""


@dataclass(frozen=True)
class Rejected:
    """Says that something gives no sample, and why; counted by reason and listed."""

    reason: str
    """One stable word to count by, for example `truncated`."""

    detail: str = ""
    """What was found, in words; the same on every run and machine."""


@dataclass(frozen=True)
class About:
    """What a data set's card says of where it comes from."""

    title: str
    """Its name as its makers write it."""

    homepage: str
    """Where it is got, as an address."""

    license: str
    """What may be done with it, in a sentence or two."""


@runtime_checkable
class Converter(Protocol):
    """A data set's format. Its settings are its attributes (a frozen dataclass is ideal).

    A class attribute `about: ClassVar[About]` is optional: the data set's card quotes it.
    """

    @property
    def name(self) -> str:
        """Short name of the data set: output files start with it."""
        ...

    def discover(self, source: Path) -> Iterator[Item]:
        """Yield the items of `source` in output order, quickly: names, not contents.

        Raises:
            ValueError: the source has not the expected layout.
        """
        ...

    def convert(self, item: Item, out_dir: Path) -> Iterator[Sample | Rejected]:
        """Yield the samples of one item, or say why there is none.

        Runs in another process. The same item must give the same samples and images on every
        run. Image paths in samples are relative to `out_dir/images`; `write_image` puts them there.
        """
        ...


def write_image(out_dir: Path, name: str, content: bytes) -> str:
    """Write `content` to `out_dir/images/name`, whole or not at all, and return `name`.

    Raises:
        ValueError: `name` is absolute or leaves the image folder.
    """
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or not any(part not in ("", ".") for part in parts):
        raise ValueError(f"expected an image path inside images/, got {name!r}")
    # Plain strings: pathlib would take longer than the file system.
    target = os.path.normpath(f"{out_dir}/images/{name}")
    folder, _, file_name = target.rpartition("/")
    # One temporary name per target: what a killed run left, the next one replaces. No fsync, which
    # would cost more than encoding: a resumed run looks at the images of what is finished.
    digest = hashlib.blake2b(os.fsencode(file_name), digest_size=8).hexdigest()
    temporary = f"{folder}/.{digest}{TEMPORARY_MARK}"
    try:
        file = open(temporary, "wb", buffering=0)
    except FileNotFoundError:
        os.makedirs(folder, exist_ok=True)
        file = open(temporary, "wb", buffering=0)
    with file:
        if file.write(content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)
    os.replace(temporary, target)
    return name


def list_converters() -> dict[str, str]:
    """Name → `module:object` of every installed converter, sorted by name."""
    return {point.name: point.value for point in _points()}


def get_converter(name: str, **options: object) -> Converter:
    """Find a converter and construct it.

    Args:
        name: the name of an installed converter, or `module:object`; the object is a class, a
            converter ready to use, or a function of a file.
        options: keyword arguments of the class, or of the function; a function also takes
            `files`, the pattern of the files it gets.

    Raises:
        ValueError: there is none of that name, it is no converter, or it has no such option.
    """
    from phi3v_data.converters.function_converter import is_function

    found = load_converter(name)
    if is_function(found):
        return _bind(name, cast("Any", found), options)
    if not isinstance(found, type):
        if options:
            raise ValueError(
                f"converter {name!r} is an object already made: it takes no options, got "
                f"{', '.join(sorted(options))}"
            )
        converter = found
    else:
        _check_options(name, found, options)
        try:
            converter = found(**options)
        except TypeError as error:
            raise ValueError(f"converter {name!r}: {error}") from error
    if not isinstance(converter, Converter):
        raise ValueError(
            f"{name!r} is no converter: expected `name`, `discover(source)` and "
            f"`convert(item, out_dir)`, got {type(converter).__name__}"
        )
    return converter


def _points() -> list[EntryPoint]:
    return sorted(entry_points(group=GROUP), key=lambda point: point.name)


def _bind(name: str, function: Any, options: dict[str, object]) -> Converter:
    from phi3v_data.converters.function_converter import FunctionConverter, settings_of

    settings = dict(options)
    pattern = {"files": str(settings.pop("files"))} if "files" in settings else {}
    known = list(settings_of(function))
    _check_names(name, [*known, "files"], settings)
    return FunctionConverter(function, **pattern, settings=settings)


def load_converter(name: str) -> object:
    """The class, object or function behind a name or `module:object`.

    Raises:
        ValueError: there is none of that name.
    """
    if ":" in name:
        return _load_object(name)
    points = {point.name: point for point in _points()}
    if name in points:
        try:
            return points[name].load()
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"converter {name!r} is installed but broken ({points[name].value}): {error}"
            ) from error
    near = difflib.get_close_matches(name, points, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"no converter named {name!r}.{hint} Installed: {', '.join(points) or 'none'}. "
        "One of your own is given as module:object."
    )


def _load_object(name: str) -> object:
    module_name, _, path = name.partition(":")
    try:
        found: object = import_module(module_name)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"expected module:object with an importable module, got {name!r}: {error}"
        ) from error
    return found


def _check_options(name: str, found: type, options: dict[str, object]) -> None:
    parameters = inspect.signature(cast("Any", found)).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    _check_names(name, known, options)


def _check_names(name: str, known: list[str], options: dict[str, object]) -> None:
    for option in sorted(options):
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"converter {name!r} has no option {option}; it has {', '.join(known) or 'none'}."
                f"{hint}"
            )
