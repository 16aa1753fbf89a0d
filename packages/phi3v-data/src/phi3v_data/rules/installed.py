"""Rules of other packages, by entry point.

    [project.entry-points."phi3v_data.rules"]
    ours = "our_rules:RULES"        # a Rule, or a list of them

A package that does not load, or whose codes are taken, is named and left out: its mistake must not
keep anybody from checking data.
"""

import re
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

from phi3v_data.rules.rule import Rule

GROUP = "phi3v_data.rules"
"""The entry point group under which packages offer rules."""

CODE = re.compile(r"[A-Z]+[0-9]+")


@dataclass(frozen=True, slots=True)
class BrokenRules:
    """An entry point whose rules cannot be used."""

    name: str
    problem: str

    def __str__(self) -> str:
        return f"rules {self.name!r} are installed but broken: {self.problem}"


def load_installed(known: tuple[Rule, ...]) -> tuple[tuple[Rule, ...], tuple[BrokenRules, ...]]:
    """The rules that other packages offer beside `known`, and the offers that are broken."""
    rules: list[Rule] = []
    broken: list[BrokenRules] = []
    owners = {rule.code: "phi3v-data" for rule in known}
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        found, problem = _load(point)
        for rule in found:
            if not CODE.fullmatch(rule.code):
                problem = f"code {rule.code!r}: expected capital letters, then digits, as in X101"
            elif rule.code in owners:
                problem = f"code {rule.code} is already one of {owners[rule.code]}"
            elif not (rule.check.__doc__ or "").strip():
                problem = f"{rule.code} has no docstring, which is its documentation"
            else:
                owners[rule.code] = point.name
                rules.append(rule)
        if problem:
            broken.append(BrokenRules(point.name, problem))
    return tuple(rules), tuple(broken)


def _load(point: EntryPoint) -> tuple[list[Rule], str]:
    try:
        offered: Any = point.load()
    except Exception as error:  # whatever another package raises when it is imported
        return [], f"{point.value}: {type(error).__name__}: {error}"
    is_many = isinstance(offered, list | tuple)
    listed = list(cast("list[Any]", offered)) if is_many else [offered]
    for one in listed:
        if not isinstance(one, Rule):
            return [], f"{point.value}: expected a Rule or a list of them, got {one!r:.100}"
    return cast("list[Rule]", listed), ""
