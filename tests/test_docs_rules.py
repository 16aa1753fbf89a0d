"""docs/rules.md is what the docstrings of the rules say."""

import re
from pathlib import Path

from phi3v_data.rules import RULES
from phi3v_data.rules.page import to_markdown

PAGE = Path(__file__).resolve().parents[1] / "docs/rules.md"


def test_the_page_of_rules_is_up_to_date():
    assert PAGE.read_text() == to_markdown(RULES), (
        "docs/rules.md differs from the rules: run `phi3v-data rules --format markdown "
        "> docs/rules.md`"
    )


def test_the_page_has_every_rule_and_its_links_lead_to_them():
    page = to_markdown(RULES)
    anchors = {
        heading.lower().replace(" ", "-")
        for heading in re.findall(r"^### (.*)$", page, re.MULTILINE)
    }

    assert set(re.findall(r"\]\(#([^)]*)\)", page)) == anchors
    assert len(anchors) == len(RULES)
    for rule in RULES:
        assert f"| {rule.name} | {rule.severity} | {'on' if rule.is_default else 'off'} |" in page
