"""For every rule a line that breaks it, with the message, and one that passes them all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from phi3v_data.checked_lines import check
from phi3v_data.diagnostics import Diagnostic
from phi3v_data.rules import RULES, select_rules
from PIL import Image

GOOD = {
    "id": "a",
    "source": "toy",
    "conversations": [
        {"images": ["good.png"], "user": "What?", "assistant": "Red", "answers": ["Red", "red"]},
        {"images": ["sub/b.png", "good.png"], "user": "<|image_2|>, <|image_1|>", "assistant": "B"},
    ],
    "metadata": {"k": 1},
}

Findings = Callable[..., list[Diagnostic]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for name in ("good.png", "sub/b.png"):
        Image.new("RGB", (20, 10)).save(tmp_path / "images" / name)
    return tmp_path


@pytest.fixture
def findings(root: Path) -> Findings:
    """Diagnostics of a file of the given lines (bytes, or an object to dump)."""

    def run(*lines: bytes | dict[str, Any], **options: Any) -> list[Diagnostic]:
        content = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
        (root / "x.jsonl").write_bytes(b"\n".join(content) + b"\n")
        return [d for c in check([root / "x.jsonl"], **options) for d in c.diagnostics]

    return run


def one(diagnostics: list[Diagnostic], code: str) -> Diagnostic:
    assert [d.code for d in diagnostics] == [code], diagnostics
    return diagnostics[0]


def turn(**fields: Any) -> dict[str, Any]:
    """A good sample of one turn, changed."""
    return {
        "id": "a",
        "source": "toy",
        "conversations": [{"user": "What?", "assistant": "Red", **fields}],
    }


def test_a_good_sample_passes_all_rules(findings: Findings):
    assert findings(GOOD, {**GOOD, "id": "b"}) == []


def test_I101_reports_a_missing_image(findings: Findings):
    d = one(findings(GOOD, turn(images=["no.png"]) | {"id": "b"}), "I101")

    assert d.message == "image 'no.png' does not exist"
    assert (d.line, d.pointer, d.sample_id) == (2, "/conversations/0/images/0", "b")
    assert d.help.startswith("the image root is ")


def test_I101_names_a_file_that_differs_in_case(findings: Findings):
    assert one(findings(turn(images=["GOOD.png"])), "I101").help == (
        "there is 'good.png': case counts"
    )


def test_I101_takes_no_folder_for_an_image(findings: Findings):
    assert one(findings(turn(images=["sub"])), "I101").message == "image 'sub' is not a file"


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "is empty"), (b"hello", "does not decode: not an image"), (None, "truncated")],
)
def test_I102_reports_what_does_not_decode(
    findings: Findings, root: Path, content: bytes | None, problem: str
):
    if content is None:
        Image.effect_noise((80, 80), 99).save(root / "images" / "x.jpg")
        content = (root / "images" / "x.jpg").read_bytes()[:-100]
    (root / "images" / "x.jpg").write_bytes(content)

    assert problem in one(findings(turn(images=["x.jpg"])), "I102").message


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("../x.jsonl", "leaves the image root by .."),
        ("sub/../../x.jsonl", "leaves the image root by .."),
        ("/etc/passwd", "is absolute"),
        ("C:/x.png", "is absolute"),
        ("sub\\b.png", "holds a backslash"),
        ("a\0b.png", "holds a NUL character"),
        ("", "is empty"),
        ("link.png", "is a link that leads out"),
        ("out/x.png", "is a link that leads out"),
    ],
)
def test_I103_keeps_paths_under_the_root(findings: Findings, root: Path, path: str, problem: str):
    Image.new("RGB", (9, 9)).save(root / "x.png")
    (root / "images" / "link.png").symlink_to(root / "x.png")
    (root / "images" / "out").symlink_to(root)

    assert problem in one(findings(turn(images=[path])), "I103").message


def test_I103_allows_links_within_the_root_and_a_root_that_is_a_link(
    findings: Findings, root: Path
):
    (root / "images" / "link.png").symlink_to("good.png")
    (root / "elsewhere").symlink_to(root / "images")

    assert findings(turn(images=["link.png"]), images=root / "elsewhere") == []


def test_I104_warns_of_a_wrong_extension(findings: Findings, root: Path):
    Image.new("RGB", (9, 9)).save(root / "images" / "x.jpg", "PNG")
    d = one(findings(turn(images=["x.jpg"])), "I104")

    assert (d.severity, d.message) == ("warning", "image 'x.jpg' is PNG by content")


@pytest.mark.parametrize(
    ("size_wh", "num_crops", "is_extreme"),
    [
        ((5376, 1), 16, False),  # 16 crops of 336 pixels: the short side is just 1
        ((5377, 1), 16, True),
        ((1, 5377), 16, True),
        ((337, 1), 1, True),
        ((672, 1), 2, False),
    ],
)
def test_I105_reports_a_side_that_would_become_zero(
    findings: Findings, root: Path, size_wh: tuple[int, int], num_crops: int, is_extreme: bool
):
    Image.new("L", size_wh).save(root / "images" / "x.png")
    codes = [d.code for d in findings(turn(images=["x.png"]), num_crops=num_crops)]

    assert codes == (["I105"] if is_extreme else [])


@pytest.mark.parametrize(
    ("size_wh", "num_crops", "message", "help"),
    [
        (
            (3000, 2),
            4,
            "image 'x.png' is 3000x2 (width x height): "
            "its short side becomes 0 pixels at num_crops 4",
            "crop it, or pad its short side, or use at least 5 crops, here and in training",
        ),
        (
            (1, 9000),
            16,
            "image 'x.png' is 1x9000 (width x height): "
            "its short side becomes 0 pixels at num_crops 16",
            "crop it, or pad its short side",  # 27 crops are more than the model was made for
        ),
    ],
)
def test_I105_names_size_crops_and_the_way_out(
    findings: Findings,
    root: Path,
    size_wh: tuple[int, int],
    num_crops: int,
    message: str,
    help: str,
):
    Image.new("L", size_wh).save(root / "images" / "x.png")
    d = one(findings(turn(images=["good.png", "x.png"]), num_crops=num_crops), "I105")

    assert (d.severity, d.message, d.help) == ("error", message, help)
    assert d.pointer == "/conversations/0/images/1"


def test_I105_takes_the_crops_it_advises(findings: Findings, root: Path):
    Image.new("L", (3000, 2)).save(root / "images" / "x.png")

    assert findings(turn(images=["x.png"]), num_crops=5) == []


def test_I105_looks_at_the_size_after_turning(findings: Findings, root: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (400, 1)).save(root / "images" / "x.png", exif=exif)

    found = findings(turn(images=["x.png"]), num_crops=1)
    (aspect,) = (d for d in found if d.code == "I105")
    assert "is 1x400 (width x height)" in aspect.message


def test_T101_reports_empty_answers(findings: Findings):
    assert one(findings(turn(assistant=" \n")), "T101").pointer == "/conversations/0/assistant"
    d = one(findings(turn(assistant="a", answers=["a", ""])), "T101")
    assert d.pointer == "/conversations/0/answers/1"


@pytest.mark.parametrize(
    "token",
    "<|user|> <|assistant|> <|system|> <|end|> <|endoftext|> <|image|> <|placeholder7|> "
    "<s> </s> <unk>".split(),
)
@pytest.mark.parametrize("key", ["user", "assistant"])
def test_T102_reports_special_tokens(findings: Findings, token: str, key: str):
    d = one(findings(turn(**{key: f"a {token} b {token}"})), "T102")

    assert d.pointer == f"/conversations/0/{key}"
    assert repr(token) in d.message


def test_T102_allows_no_image_mark_in_an_answer(findings: Findings):
    assert "'<|image_1|>'" in one(findings(turn(assistant="<|image_1|>")), "T102").message


def test_T102_leaves_harmless_lookalikes(findings: Findings):
    assert findings(turn(user="<|image_x|> <b> <|End|> < s > x<y|z>", assistant="a|b")) == []


@pytest.mark.parametrize(
    ("images", "user", "problem"),
    [
        (["good.png"], "<|image_2|>", "<|image_2|> has no image, image 1 is not placed"),
        (["good.png"], "<|image_1|> <|image_1|>", "image 1 is placed 2 times"),
        (["good.png"] * 2, "<|image_1|>", "image 2 is not placed"),
        ([], "<|image_1|>", "<|image_1|> has no image"),
        (["good.png"], "<|image_0|>", "<|image_0|> has no image, image 1 is not placed"),
    ],
)
def test_T103_wants_every_image_placed_exactly_once(
    findings: Findings, images: list[str], user: str, problem: str
):
    d = one(findings(turn(images=images, user=user)), "T103")

    assert d.message.endswith(problem)
    assert f"turn's {len(images)} image" in d.message


def test_T104_reports_a_missing_answer_unless_allowed(findings: Findings):
    sample = turn()
    del sample["conversations"][0]["assistant"]

    assert one(findings(sample), "T104").help == "test splits: --allow_missing_answer"
    assert findings(sample, allow_missing_answer=True) == []


def test_D101_reports_an_id_used_before(findings: Findings):
    d = one(findings(GOOD, turn() | {"id": "b"}, turn()), "D101")

    assert (d.line, d.message) == (3, "id 'a' is already used: line 1")


def test_every_rule_is_documented_and_has_its_own_code():
    codes = [rule.code for rule in RULES]

    assert len(set(codes)) == len(codes) >= 12
    for rule in RULES:
        assert rule.summary.endswith(".")
        assert len(rule.documentation) > len(rule.summary) + 40, rule.code


def test_rules_are_selected_and_ignored_by_prefix():
    assert {rule.code[0] for rule in select_rules(("I", "T101"))} == {"I", "T"}
    assert [rule.code for rule in select_rules(("T10",), ("T101", "T102", "T103"))] == [
        "T104", "T105", "T106", "T107",
    ]  # fmt: skip
    assert select_rules() == tuple(rule for rule in RULES if rule.is_default)


def test_a_rule_that_does_not_exist_is_an_error_with_the_nearest_code():
    with pytest.raises(ValueError, match=r"'T1o1'; did you mean T101\?"):
        select_rules(("T1o1",))
    with pytest.raises(ValueError, match="`phi3v-data rules` lists them"):
        select_rules((), ("ZZZ9",))
