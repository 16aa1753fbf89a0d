"""What `validate` is told: the command line, and the nearest pyproject.toml.

    [tool.phi3v-data.validate]
    ignore = ["I104"]                      # codes, or their beginnings
    severity = {T101 = "warning"}          # error, warning or off
    per-file-ignores = {"test*.jsonl" = ["T104"]}
    max-errors = 100
    num_crops = 4
    level = "full"                         # how closely images are looked at
    cache = false
    unused = true                          # also find image files that no sample names
    format = "concise"

    config = load_config(Path.cwd(), overrides={"ignore": ["D"]})
    rules = config.rules_for("data/test.jsonl")

The command line wins over the file, setting by setting; severities are merged code by code.
Names are written with `-` or `_`.
"""

import difflib
import fnmatch
import os
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError

from phi3v_data.image_check import Level
from phi3v_data.rules import all_rules, check_codes
from phi3v_data.rules.rule import Rule

SeverityOrOff = Literal["error", "warning", "off"]
Codes = Annotated[tuple[str, ...], Strict(False)]
UNUSED = "I110"
TABLE = "tool.phi3v-data.validate"


class ValidateConfig(BaseModel):
    """The settings of a validation."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    select: Codes = ()
    """Beginnings of the codes to run; empty: all that are on by default. The full code of a rule
    that is off by default switches it on."""

    ignore: Codes = ()
    """Beginnings of codes not to run; stronger than all else."""

    severity: dict[str, SeverityOrOff] = {}
    """Beginning of a code → its severity; the longest wins. The full code of a rule that is off by
    default switches it on."""

    per_file_ignores: dict[str, Codes] = {}
    """Glob of JSONL files → codes not to run on them. A glob without `/` is compared with the
    file's name, others with its path from the folder of the pyproject.toml."""

    max_errors: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many errors."""

    num_crops: Annotated[int, Field(ge=1)] = 16
    """Most crops an image in training."""

    level: Level = "deep"
    """How closely images are looked at."""

    cache: bool = True
    """Believe what an earlier run found out about images that did not change."""

    unused: bool = False
    """Look for image files under the image root that no sample names (I110)."""

    format: Literal["text", "concise", "json", "sarif", "github"] = "text"
    """How the report is printed."""

    root: Annotated[Path, Strict(False)] = Path()
    """The folder that globs start from: that of the pyproject.toml, else the current one."""

    def rules(self) -> tuple[Rule, ...]:
        """The rules that run on any file, each with its severity in this run.

        Raises:
            ValueError: a code that no rule has.
        """
        rules = all_rules()
        check_codes((*self.select, *self.ignore, *self.severity), rules)
        for codes in self.per_file_ignores.values():
            check_codes(codes, rules)
        chosen: list[Rule] = []
        for rule in rules:
            level = self._level(rule)
            is_on = rule.code in (*self.select, *self.severity)
            is_on = is_on or (self.unused and rule.code == UNUSED)
            if rule.is_default:
                is_on = not self.select or rule.code.startswith(self.select)
            if is_on and level != "off" and not rule.code.startswith(self.ignore or "\0"):
                chosen.append(replace(rule, severity=level))
        return tuple(chosen)

    def rules_for(self, file: str | os.PathLike[str]) -> tuple[Rule, ...]:
        """The rules that run on `file`: `rules()` without those that are ignored for it.

        Raises:
            ValueError: a code that no rule has.
        """
        ignored = tuple(
            code
            for glob, codes in self.per_file_ignores.items()
            if self._matches(file, glob)
            for code in codes
        )
        return tuple(rule for rule in self.rules() if not rule.code.startswith(ignored or "\0"))

    def _level(self, rule: Rule) -> SeverityOrOff:
        """The severity that the longest matching beginning gives, else the rule's own."""
        named = [prefix for prefix in self.severity if rule.code.startswith(prefix)]
        return self.severity[max(named, key=len)] if named else rule.severity

    def _matches(self, file: str | os.PathLike[str], glob: str) -> bool:
        path = PurePath(os.path.abspath(file))
        if "/" not in glob:
            return fnmatch.fnmatchcase(path.name, glob)
        start = PurePath(os.path.abspath(self.root))
        return path.is_relative_to(start) and fnmatch.fnmatchcase(
            path.relative_to(start).as_posix(), glob
        )


def load_config(folder: Path, overrides: Mapping[str, Any] | None = None) -> ValidateConfig:
    """The settings of the nearest pyproject.toml above `folder`, with `overrides` on top.

    Files without the table `[tool.phi3v-data.validate]` are passed over.

    Args:
        folder: where to begin to look, usually the current folder.
        overrides: settings of the command line, by field name; None is no setting.

    Raises:
        ValueError: a file that is not TOML, an unknown key, a value of the wrong kind.
    """
    path, settings = _find_table(folder)
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    # The file is checked alone first: what is wrong with it must name it.
    config = _make(settings, f"{path}: [{TABLE}]" if path else "")
    severity = {**config.severity, **given.pop("severity", {})}
    merged = {**config.model_dump(), **given, "severity": severity}
    return _make({**merged, "root": path.parent if path else folder}, "")


def _find_table(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    for place in (folder, *folder.parents):
        path = place / "pyproject.toml"
        if not path.is_file():
            continue
        try:
            table: Any = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not TOML: {error}") from None
        for name in TABLE.split("."):
            table = cast("dict[str, Any]", table).get(name) if isinstance(table, dict) else None
        if table is not None:
            if not isinstance(table, dict):
                raise ValueError(f"{path}: [{TABLE}]: expected a table, got {table!r}")
            return path, _underscored(cast("dict[str, Any]", table), f"{path}: [{TABLE}]")
    return None, {}


def _underscored(table: dict[str, Any], where: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    known = [name for name in ValidateConfig.model_fields if name != "root"]
    for key, value in table.items():
        name = key.replace("-", "_")
        if name in settings:
            raise ValueError(f"{where}: {key} is given twice, with - and with _")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
            raise ValueError(f"{where}: unknown key {key!r}; {hint}")
        settings[name] = value
    return settings


def _make(settings: dict[str, Any], where: str) -> ValidateConfig:
    try:
        return ValidateConfig(**settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        problem = f"{place}: {first['msg']}, got {first['input']!r}"
        raise ValueError(f"{where}: {problem}" if where else problem) from None
