"""What can be wrong with a sample: one function a code, its docstring is its documentation.

    phi3v-data rules          # the table below
    phi3v-data rules I101     # one rule, explained

The first letter groups the codes: `P` parsing a line, `S` the schema, `I` images, `T` text,
`D` across samples. A rule gets a line or a sample with its `Context` and yields a `Finding` for
each thing wrong. Adding one is a function and an entry in `RULES`; other packages add theirs by
entry point (`phi3v_data.rules.installed`).
"""

import difflib
from functools import cache

from phi3v_data.rules import across, ids, images, parse, schema, text
from phi3v_data.rules.installed import BrokenRules, load_installed
from phi3v_data.rules.rule import Context as Context
from phi3v_data.rules.rule import Finding as Finding
from phi3v_data.rules.rule import Line as Line
from phi3v_data.rules.rule import Rule
from phi3v_data.rules.text import IMAGE_MARK as IMAGE_MARK
from phi3v_data.rules.text import SPECIAL_TOKEN as SPECIAL_TOKEN

RULES: tuple[Rule, ...] = (
    Rule("P101", "error", "line", parse.not_json),
    Rule("P102", "error", "line", parse.byte_order_mark),
    Rule("P103", "error", "line", parse.not_utf8),
    Rule("P104", "error", "line", parse.repeated_key),
    Rule("P105", "error", "line", parse.not_finite),
    Rule("P106", "error", "line", parse.too_deep),
    Rule("P107", "warning", "line", parse.blank_line),
    Rule("P108", "error", "line", parse.cut_off_file),
    Rule("S101", "error", "line", schema.schema),
    Rule("S102", "error", "line", schema.missing_key),
    Rule("S103", "error", "line", schema.unknown_key),
    Rule("S104", "error", "line", schema.wrong_type),
    Rule("S105", "error", "line", schema.empty_value),
    Rule("S106", "error", "line", schema.unanswered_turn),
    Rule("S107", "error", "line", schema.images_not_a_list),
    Rule("S108", "error", "line", schema.metadata_not_flat),
    Rule("S109", "error", "line", schema.answers_differ),
    Rule("I101", "error", "sample", images.missing_image),
    Rule("I102", "error", "sample", images.undecodable_image),
    Rule("I103", "error", "sample", images.image_outside_root),
    Rule("I104", "warning", "sample", images.wrong_extension),
    Rule("I105", "error", "sample", images.extreme_aspect_ratio),
    Rule("I106", "error", "sample", images.unreadable_image),
    Rule("I107", "error", "sample", images.too_many_pixels),
    Rule("I108", "warning", "sample", images.other_case_on_disk),
    Rule("I109", "warning", "sample", images.tiny_image),
    Rule("I110", "warning", "dataset", images.unused_file, is_default=False),
    Rule("I111", "warning", "sample", images.turned_by_exif),
    Rule("I112", "warning", "sample", images.cmyk_image),
    Rule("I113", "warning", "sample", images.palette_image),
    Rule("I114", "warning", "sample", images.transparent_image),
    Rule("I115", "warning", "sample", images.deep_image),
    Rule("I116", "warning", "sample", images.animated_image),
    Rule("T101", "error", "sample", text.empty_answer),
    Rule("T102", "error", "sample", text.special_token),
    Rule("T103", "error", "sample", text.image_marks),
    Rule("T104", "error", "sample", text.missing_answer),
    Rule("T105", "warning", "sample", text.control_character),
    Rule("T106", "warning", "sample", text.answer_in_question),
    Rule("T107", "warning", "sample", text.long_text),
    Rule("D101", "error", "sample", ids.duplicate_id),
    Rule("D102", "warning", "dataset", across.duplicate_sample),
    Rule("D103", "warning", "dataset", across.shared_image),
    Rule("D104", "warning", "dataset", across.shared_group),
    Rule("D105", "warning", "dataset", across.class_imbalance),
    Rule("D106", "warning", "dataset", across.label_typo),
    Rule("D107", "warning", "dataset", across.unknown_label),
    Rule("D108", "warning", "dataset", across.near_image, is_default=False),
)


def all_rules() -> tuple[Rule, ...]:
    """`RULES`, and those that other packages offer."""
    return (*RULES, *_installed()[0])


def broken_rules() -> tuple[BrokenRules, ...]:
    """What other packages offer as rules, but cannot be used."""
    return _installed()[1]


@cache
def _installed() -> tuple[tuple[Rule, ...], tuple[BrokenRules, ...]]:
    return load_installed(RULES)


def select_rules(select: tuple[str, ...] = (), ignore: tuple[str, ...] = ()) -> tuple[Rule, ...]:
    """The rules whose code starts with one of `select` and none of `ignore`.

    Without `select` these are the rules that are on by default. One that is off by default is
    switched on by its full code only: its cost is for those who want it.

    Raises:
        ValueError: a prefix that no code starts with.
    """
    rules = all_rules()
    check_codes((*select, *ignore), rules)
    return tuple(
        rule
        for rule in rules
        if (
            rule.code in select
            or (rule.is_default and (not select or rule.code.startswith(select)))
        )
        and not rule.code.startswith(ignore or "\0")
    )


def check_codes(prefixes: tuple[str, ...], rules: tuple[Rule, ...]) -> None:
    """Refuse what is not the beginning of a code.

    Raises:
        ValueError: a prefix that no code starts with.
    """
    codes = [rule.code for rule in rules]
    for prefix in prefixes:
        if not prefix or not any(code.startswith(prefix) for code in codes):
            near = difflib.get_close_matches(prefix.upper(), codes, n=1)
            hint = f"did you mean {near[0]}?" if near else "`phi3v-data rules` lists them"
            raise ValueError(f"no rule's code starts with {prefix!r}; {hint}")
