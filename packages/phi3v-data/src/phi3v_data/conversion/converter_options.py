"""The settings of a converter as command line options.

    @dataclass(frozen=True)
    class Captions:
        prompt: str = "Describe it."
        \"\"\"What is asked.\"\"\"

    converter_options(Captions)
    # [ConverterOption("prompt", str, "Describe it.", "What is asked.")]  →  --prompt TEXT

Names, types and defaults are those of the constructor's (or the function's) arguments; the help is
the docstring under the field. What has no such type is left to `--set NAME=VALUE`.
"""

import ast
import inspect
import sys
import textwrap
import types
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from itertools import pairwise
from typing import Any, Literal, Union, cast, get_args, get_origin

from phi3v_data.converters.function_converter import PATTERN, is_function, settings_of


@dataclass(frozen=True)
class ConverterOption:
    """One setting that can be given by name."""

    name: str

    type: type | tuple[str, ...]
    """`int`, `float`, `str`, `bool`, or the values to choose from."""

    default: object
    """None: there is none, or it says so."""

    help: str
    """In one or a few sentences; empty where there is no docstring."""


def converter_options(found: object) -> list[ConverterOption]:
    """The options of a converter's class, or of a function; none of an object already made."""
    if is_function(found):
        function = cast("Callable[..., Any]", found)
        pattern = ConverterOption(
            "files", str, PATTERN, "The files that the function gets, a pattern below SOURCE."
        )
        return [*_options(function, list(settings_of(function).values()), {}), pattern]
    if not isinstance(found, type):
        return []
    parameters = list(inspect.signature(cast("Any", found)).parameters.values())
    return _options(found, parameters, field_docs(found))


def summary(found: object) -> str:
    """The first line of its docstring."""
    if not (isinstance(found, type) or is_function(found)):
        found = type(found)
    text = inspect.getdoc(found) or ""
    return "" if text.startswith(f"{getattr(found, '__name__', '')}(") else text.partition("\n")[0]


def field_docs(found: type) -> dict[str, str]:
    """The docstrings under the fields of a class and those it inherits, each on one line."""
    docs: dict[str, str] = {}
    for base in reversed(found.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # built-in, or typed at a prompt
            continue
        (body,) = [node.body for node in tree.body if isinstance(node, ast.ClassDef)]
        for node, after in pairwise(body):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                docs[node.target.id] = " ".join(after.value.value.split())
    return docs


def _options(
    owner: Any, parameters: list[inspect.Parameter], docs: dict[str, str]
) -> list[ConverterOption]:
    options: list[ConverterOption] = []
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        default = _default(owner, parameter)
        kind = _kind(_resolve(owner, parameter), default)
        if kind is not None:
            help_text = docs.get(parameter.name, "")
            options.append(ConverterOption(parameter.name, kind, default, help_text))
    return options


def _default(owner: Any, parameter: inspect.Parameter) -> object:
    if is_dataclass(owner):
        for field in fields(owner):
            if field.name == parameter.name:
                return None if field.default is MISSING else field.default
    return None if parameter.default is parameter.empty else parameter.default


def _resolve(owner: Any, parameter: inspect.Parameter) -> object:
    """The annotation, where it is text the object that it names; None where it names none."""
    annotation = parameter.annotation
    if not isinstance(annotation, str):
        return annotation
    for base in getattr(owner, "__mro__", (owner,)):  # an inherited field's module knows its names
        module = sys.modules.get(base.__module__)
        try:
            return eval(annotation, dict(vars(module)) if module else {})
        except NameError:
            continue
    return None


def _kind(annotation: object, default: object) -> type | tuple[str, ...] | None:
    if get_origin(annotation) in (Union, types.UnionType):
        others = [part for part in get_args(annotation) if part is not type(None)]
        annotation = others[0] if len(others) == 1 else None
    if get_origin(annotation) is Literal:
        values = get_args(annotation)
        return values if all(isinstance(value, str) for value in values) else None
    if annotation is None or annotation is inspect.Parameter.empty:
        annotation = type(default)
    for known in (int, float, str, bool):
        if annotation is known:
            return known
    return None
