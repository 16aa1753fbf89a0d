from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Literal

import pytest
from phi3v_data.conversion.converter_options import (
    ConverterOption,
    converter_options,
    field_docs,
    summary,
)
from phi3v_data.converters import list_converters, load_converter


@dataclass(frozen=True)
class Base:
    """What both have."""

    size: int = 3
    """How many, 1 to
    10."""


@dataclass(frozen=True)
class Captions(Base):
    """Captions of pictures.

    More of it.
    """

    mode: Literal["a", "b"] = "a"
    """Which way."""

    rate: float | None = None
    loud: bool = False
    language: "str" = "en"
    names: tuple[str, ...] = field(default=())
    """Only by --set."""


def caption(path: Path, out_dir: Path, *, prompt: str = "What?", tries=2):
    """One caption a file."""


def test_fields_become_options_with_their_docstrings_as_help() -> None:
    assert converter_options(Captions) == [
        ConverterOption("size", int, 3, "How many, 1 to 10."),
        ConverterOption("mode", ("a", "b"), "a", "Which way."),
        ConverterOption("rate", float, None, ""),
        ConverterOption("loud", bool, False, ""),
        ConverterOption("language", str, "en", ""),
    ]


def test_arguments_of_a_function_become_options() -> None:
    names = [(option.name, option.type, option.default) for option in converter_options(caption)]
    assert names == [("prompt", str, "What?"), ("tries", int, 2), ("files", str, "**/*")]


def test_an_object_already_made_has_none() -> None:
    assert converter_options(Captions()) == []


def test_the_summary_is_the_first_line_of_the_docstring() -> None:
    @dataclass
    class Bare:
        size: int = 1

    assert summary(Captions) == summary(Captions()) == "Captions of pictures."
    assert summary(caption) == "One caption a file."
    assert summary(Bare) == ""  # dataclass writes a signature there, which says nothing


def test_a_class_without_source_has_options_without_help() -> None:
    namespace: dict[str, type] = {}
    exec("class Typed:\n    def __init__(self, size: int = 1): ...", namespace)
    assert field_docs(namespace["Typed"]) == {}
    assert converter_options(namespace["Typed"]) == [ConverterOption("size", int, 1, "")]


@pytest.mark.parametrize("name", list(list_converters()))
def test_every_setting_of_a_built_in_converter_is_an_option_with_help(name: str) -> None:
    found = load_converter(name)
    assert is_dataclass(found)
    options = {option.name: option for option in converter_options(found)}
    assert set(options) == {field.name for field in fields(found)}
    assert [name for name, option in options.items() if not option.help] == []
    assert summary(found).endswith(".")
