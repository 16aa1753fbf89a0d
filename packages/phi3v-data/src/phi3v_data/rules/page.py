"""The rules as a page: `docs/rules.md`, from the docstrings that are their documentation."""

from itertools import groupby

from phi3v_data.rules.rule import Rule

LETTERS = {
    "P": "parsing a line",
    "S": "the schema",
    "I": "images",
    "T": "text",
    "D": "across samples",
}

HEAD = """\
# Rules of `phi3v-data validate`

Written by `phi3v-data rules --format markdown > docs/rules.md` from the docstrings of the rules: do
not edit it here. `phi3v-data rules I101` explains one in the terminal.
[Validation](validation.md) tells how to select rules and change their severities.
"""


def to_markdown(rules: tuple[Rule, ...]) -> str:
    """A page of all rules: a table, then each with its documentation."""
    parts = [
        HEAD,
        "| code | name | severity | by default | what is wrong |",
        "| - | - | - | - | - |",
    ]
    for rule in rules:
        parts.append(
            f"| [{rule.code}](#{_anchor(rule)}) | {rule.name} | {rule.severity} "
            f"| {'on' if rule.is_default else 'off'} | {rule.summary.replace('|', chr(92) + '|')} |"
        )
    for letter, group in groupby(rules, key=lambda rule: rule.code[0]):
        parts.append(f"\n## {letter}: {LETTERS.get(letter, 'others')}")
        for rule in group:
            default = "" if rule.is_default else ", off by default"
            parts.append(f"\n### {rule.code} {rule.name}\n\n*{rule.severity}{default}*\n")
            parts.append(rule.documentation)
    return "\n".join(parts) + "\n"


def _anchor(rule: Rule) -> str:
    return f"{rule.code} {rule.name}".lower().replace(" ", "-")
