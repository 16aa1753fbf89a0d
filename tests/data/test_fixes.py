"""Every repair by an example, files as a whole, and random faulty files."""

import base64
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from phi3v_data.checked_lines import check
from phi3v_data.fix_files import FixedFile, FixResult, fix_files, to_text
from phi3v_data.fixes import FIXES
from phi3v_data.rules import RULES, select_rules
from phi3v_data.schema import Sample
from phi3v_data.validate import validate
from PIL import Image

from .peak_memory import run_measured

GOOD = b'{"id": "good", "source": "toy", "conversations": [{"user": "u", "assistant": "a"}]}'


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_images(tmp_path)
    return tmp_path


def make_images(folder: Path) -> None:
    (folder / "images" / "val").mkdir(parents=True)
    for name in ("a.png", "b.png", "val/c.png", "val/Übung.png"):
        Image.new("RGB", (9, 9)).save(folder / "images" / name)


def turn(**fields: Any) -> dict[str, Any]:
    return {"user": "u", "assistant": "a", **fields}


def line(*turns: dict[str, Any], **fields: Any) -> bytes:
    """A sample as a line; a field that is `...` is left out."""
    sample = {"id": "x", "source": "toy", "conversations": list(turns) or [turn()], **fields}
    return json.dumps({k: v for k, v in sample.items() if v is not ...}).encode()


def fix(root: Path, content: bytes, **options: Any) -> FixedFile:
    (root / "x.jsonl").write_bytes(content)
    (fixed,) = fix_files([root / "x.jsonl"], **options).files
    return fixed


def codes(path: Path, **options: Any) -> set[str]:
    return set(validate([path], **options).counts)


EXAMPLES: list[tuple[str, str, bytes, bytes]] = [
    # (repair, code, line before, line after)
    ("byte-order-mark", "P102", b"\xef\xbb\xbf" + line(), line()),
    ("byte-order-mark", "P102", b"\xef\xbb\xbf\xef\xbb\xbf" + line(), line()),
    ("loosely-written-json", "P101", line() + b",", line()),
    ("loosely-written-json", "P101", line()[:-1] + b", }", line()),
    (
        "loosely-written-json",
        "P101",
        line(turn(assistant="a,]|b,}", images=["a.png"]))
        .replace(b"|", b"\t")
        .replace(b"g]", b"g,]"),
        line(turn(assistant="a,]|b,}", images=["a.png"])).replace(b"|", b"\\u0009"),
    ),
    (
        "windows-1252-to-utf8",
        "P103",
        line(turn(user="X Y")).replace(b"X", "é".encode()).replace(b"Y", b"caf\xe9 \x80"),
        line(turn(user="X Y")).replace(b"X Y", "é café €".encode()),
    ),
    (
        "not-a-number-to-null",
        "P105",
        b'{"metadata": {"a": NaN, "b": "NaN, -Infinity", "c": -Infinity}, ' + line()[1:],
        b'{"metadata": {"a": null, "b": "NaN, -Infinity", "c": null}, ' + line()[1:],
    ),
    ("repeated-key", "P104", b'{"id": "x", ' + line()[1:], line()),
    ("last-of-repeated-keys", "P104", b'{"id": "w", ' + line()[1:], line()),
    (
        "key-in-other-case",
        "S103",
        line(id=..., ID="x"),
        b'{"source": "toy", "conversations": [{"user": "u", "assistant": "a"}], "id": "x"}',
    ),
    (
        "key-in-other-case",
        "S103",
        line({"User ": "u", "assistant": "a"}),
        line({"user": "u", "assistant": "a"}),
    ),
    ("misspelt-key", "S103", line({"usre": "u", "assistant": "a"}), line()),
    ("null-to-absent", "S107", line(turn(images=None)), line()),
    ("single-value-to-list", "S107", line(turn(images="a.png")), line(turn(images=["a.png"]))),
    ("single-value-to-list", "S104", line(turn(answers="a")), line(turn(answers=["a"]))),
    ("single-value-to-list", "S104", line(conversations=turn()), line()),
    (
        "whole-number-as-text",
        "S104",
        line(turn(assistant=3), id=7),
        line(turn(assistant="3"), id="7"),
    ),
    ("fraction-as-text", "S104", line(turn(assistant=2.5)), line(turn(assistant="2.5"))),
    ("answer-of-answers", "S109", line(turn(answers=["b", "a"])), line(turn(answers=["a", "b"]))),
    ("answer-of-answers", "S109", line(turn(answers=[])), line()),
    (
        "answer-of-answers",
        "S109",
        line({"user": "u", "answers": ["a"]}),
        line({"user": "u", "answers": ["a"], "assistant": "a"}),
    ),
    ("answer-joins-answers", "S109", line(turn(answers=["b"])), line(turn(answers=["a", "b"]))),
    ("own-key-to-metadata", "S103", line(width=3), line(metadata={"width": 3})),
    (
        "own-key-to-metadata",
        "S103",
        line(width=3, metadata={"k": 1}),
        line(metadata={"k": 1, "width": 3}),
    ),
    (
        "any-key-to-metadata",
        "S103",
        line(turn(score=1), box=[1, 2]),
        line(metadata={"box": "[1, 2]", "conversations/0/score": 1}),
    ),
    ("any-key-to-metadata", "S108", line(metadata={"k": {}}), line(metadata={"k": "{}"})),
    ("missing-id-or-source", "S102", line(source=...), line(source=...)[:-1] + b', "source": "x"}'),
    ("missing-id-or-source", "S105", line(id=""), line(id="x-1")),
    ("image-path", "I103", line(turn(images=["val\\c.png"])), line(turn(images=["val/c.png"]))),
    ("image-path", "I101", line(turn(images=["VAL/C.PNG"])), line(turn(images=["val/c.png"]))),
    ("image-path", "I101", line(turn(images=["./images/a.png"])), line(turn(images=["a.png"]))),
    (
        "image-path",
        "I101",
        line(turn(images=["a.png", "val/u\u0308bung.png"])),
        json.dumps(
            json.loads(line(turn(images=["a.png", "val/Übung.png"]))), ensure_ascii=False
        ).encode(),
    ),
    (
        "image-path-with-parents",
        "I103",
        line(turn(images=["val/../a.png"])),
        line(turn(images=["a.png"])),
    ),
    (
        "special-token",
        "T102",
        line(turn(user="u<|user|>", assistant="b<|image_1|>", answers=["b<|image_1|>", "c</s>"])),
        line(turn(assistant="b", answers=["b", "c"])),
    ),
    ("special-token", "T102", line(turn(assistant="a<|e<s>nd|>")), line(turn(assistant="a"))),
    (
        "marks-numbered-across-turns",
        "T103",
        line(
            turn(images=["a.png"]), turn(images=["b.png", "a.png"], user="<|image_3|><|image_2|>")
        ),
        line(
            turn(images=["a.png"]), turn(images=["b.png", "a.png"], user="<|image_2|><|image_1|>")
        ),
    ),
    (
        "marks-removed",
        "T103",
        line(turn(images=["a.png"], user="<|image_2|>\nu")),
        line(turn(images=["a.png"])),
    ),
    (
        "control-character",
        "T105",
        line(turn(user="1\r\n2\r3\t\x1b[0m", answers=["a", "\0b"])),
        line(turn(user="1\n2\n3\t[0m", answers=["a", "b"])),
    ),
    ("empty-answer", "T101", line(turn(answers=["a", " "])), line(turn(answers=["a"]))),
]


@pytest.mark.parametrize(
    ("name", "code", "before", "after"),
    EXAMPLES,
    ids=[f"{n}-{e[0]}" for n, e in enumerate(EXAMPLES)],
)
def test_a_repair_does_what_its_example_says(
    root: Path, name: str, code: str, before: bytes, after: bytes
):
    (of_name,) = [fix for fix in FIXES if fix.name == name]
    fixed = fix(root, before + b"\n", unsafe=not of_name.is_safe)

    assert code in of_name.codes
    assert (root / "x.fixed.jsonl").read_bytes() == after + b"\n"
    assert code in fixed.fixed
    assert (fixed.num_repaired, fixed.num_dropped, fixed.errors_left) == (1, 0, {})
    assert codes(root / "x.fixed.jsonl") == set()


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(e, id=f"{n}-{e[0]}")
        for n, e in enumerate(EXAMPLES)
        if not next(fix for fix in FIXES if fix.name == e[0]).is_safe
    ],
)
def test_a_safe_fix_leaves_what_only_an_unsafe_one_repairs(
    root: Path, example: tuple[str, str, bytes, bytes]
):
    _, code, before, _ = example
    fixed = fix(root, before + b"\n")

    assert (root / "x.fixed.jsonl").read_bytes() == before + b"\n"
    assert not fixed.is_changed
    assert code in {**fixed.errors_left, **fixed.warnings_left}


def test_every_repair_has_an_example_a_reason_and_codes_of_rules():
    assert {fix.name for fix in FIXES} == {name for name, *_ in EXAMPLES}
    for fix_ in FIXES:
        assert len(fix_.documentation) > 80, fix_.name
        assert ("nsafe: " in fix_.documentation) == (not fix_.is_safe) or "by its letters" in (
            fix_.documentation
        )
        assert set(fix_.codes) <= {rule.code for rule in RULES}


@pytest.mark.parametrize("unsafe", [False, True])
def test_what_is_valid_goes_through_byte_for_byte(root: Path, unsafe: bool):
    content = (
        b'{ "source":"toy" ,"id":"\\u0031", "metadata":{"x":1.500e+0, "y": null},\t'
        + b'"conversations":[{"assistant":" padded ","user":"\\u00e9 \xc3\xa9","images":[]}]}  \r\n'
        + GOOD
        + b"\r\n\n  "  # blank lines at the end are fine
    )
    fixed = fix(root, content, unsafe=unsafe)

    assert (root / "x.fixed.jsonl").read_bytes() == content
    assert (fixed.is_changed, fixed.num_lines, fixed.fixed) == (False, 2, {})
    assert to_text(FixResult((fixed,))).endswith(f"nothing to fix; copied to {fixed.target}")


def test_valid_lines_beside_faulty_ones_are_untouched(root: Path):
    odd = b'{"conversations":[{"user":"u","assistant":"\\u0061"}],  "source":"toy","id":"odd"}\r\n'
    fix(root, odd + line(id=3) + b"\r\n" + line(turn(assistant="")) + b"\n" + odd[:-2], unsafe=True)

    assert (root / "x.fixed.jsonl").read_bytes() == odd + line(id="3") + b"\r\n"
    assert json.loads((root / "x.dropped.jsonl").read_text().splitlines()[1])["code"] == "D101"


def test_a_line_is_repaired_layer_by_layer(root: Path):
    layered = b"\xef\xbb\xbf" + line(turn(images="A.PNG", assistant="a<|end|>"), id=3) + b","
    safe = fix(root, layered + b"\n")
    assert safe.fixed == {"P101": 1, "P102": 1, "S104": 1, "S107": 1, "I101": 1}
    assert safe.errors_left == {"T102": 1}
    unsafe = fix(root, layered + b"\n", unsafe=True)

    assert (root / "x.fixed.jsonl").read_bytes() == line(turn(images=["a.png"]), id="3") + b"\n"
    assert unsafe.fixed == {**safe.fixed, "T102": 1}


def test_an_unsafe_fix_drops_what_is_left_and_keeps_it_with_line_code_and_reason(root: Path):
    lines = [
        GOOD,
        b'{"id": "cut',
        b"",
        b"[" * 5000,
        line(turn(images=["gone.png"])),
        b"\xff\xfe\x81",
        line(turn(assistant="<|end|>")),
        line(turn(images=["a.png"]), id="last"),
    ]
    fixed = fix(root, b"\n".join(lines), unsafe=True)
    records = [json.loads(x) for x in (root / "x.dropped.jsonl").read_text().splitlines()]

    assert (root / "x.fixed.jsonl").read_bytes() == GOOD + b"\n" + lines[-1]
    assert [(r["line"], r["code"]) for r in records] == [
        (2, "P101"),
        (4, "P106"),
        (5, "I101"),
        (6, "P103"),
        (7, "T101"),
    ]
    assert records[0]["content"] == '{"id": "cut'
    assert records[2]["reason"] == "image 'gone.png' does not exist"
    assert records[2]["pointer"] == "/conversations/0/images/0"
    assert base64.b64decode(records[3]["content_base64"]) == lines[5]
    assert records[4]["content"].encode() == lines[6]  # as it was, not half repaired
    assert fixed.dropped_file == str(root / "x.dropped.jsonl")
    assert fixed.dropped == {"P101": 1, "P103": 1, "P106": 1, "I101": 1, "T101": 1}
    assert fixed.fixed == {"P107": 1}


def test_blank_lines_between_samples_are_removed_where_a_rule_objects(root: Path):
    content = b"\r\n \n" + GOOD + b"\n\n\n" + line() + b"\n\n"
    fixed = fix(root, content)

    assert (root / "x.fixed.jsonl").read_bytes() == GOOD + b"\n" + line() + b"\n\n"
    assert fixed.fixed == {"P107": 4}
    fix(root, content, rules=select_rules(ignore=("P107",)))
    assert (root / "x.fixed.jsonl").read_bytes() == content


def test_a_line_of_nothing_but_a_byte_order_mark_is_removed(root: Path):
    fixed = fix(root, b"\xef\xbb\xbf\n" + GOOD + b"\n")

    assert (root / "x.fixed.jsonl").read_bytes() == GOOD + b"\n"
    assert fixed.fixed == {"P102": 1}


def test_a_safe_fix_drops_nothing_and_counts_what_is_left(root: Path):
    content = (
        b"{\n" + line(turn(assistant="")) + b"\n" + line(turn(images=["gone.png"]), id=1) + b"\n"
    )
    fixed = fix(root, content)

    assert fixed.errors_left == {"P101": 1, "I101": 1, "T101": 1}
    assert FixResult((fixed,)).exit_status == 1
    assert "3 errors left (P101 1, I101 1, T101 1)" in to_text(FixResult((fixed,)))
    assert not (root / "x.dropped.jsonl").exists()


def test_warnings_are_no_reason_to_drop(root: Path):
    Image.new("RGB", (9, 9)).save(root / "images" / "x.jpg", "PNG")
    fixed = fix(root, line(turn(images=["x.jpg"])) + b"\n", unsafe=True)

    assert not fixed.is_changed
    assert fixed.warnings_left == {"I104": 1}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_file_in_utf16_becomes_utf8(root: Path, encoding: str):
    text = GOOD.decode().replace('"u"', '"grün 🎈"') + "\n" + line(id=3).decode() + "\n"
    fixed = fix(root, text.encode(encoding))

    assert (root / "x.fixed.jsonl").read_text(encoding="utf-8") == text.replace(": 3", ': "3"')
    assert fixed.fixed == {"P102": 1, "S104": 1}


def test_a_damaged_utf16_file_stays_in_a_safe_fix_and_is_saved_by_an_unsafe_one(root: Path):
    content = (GOOD.decode() + "\n").encode("utf-16") + b"\x00\xd8"
    assert fix(root, content).errors_left == {"P102": 1}
    assert (root / "x.fixed.jsonl").read_bytes() == content
    fix(root, content, unsafe=True)

    assert (root / "x.fixed.jsonl").read_bytes() == GOOD + b"\n"


def test_two_images_that_differ_in_case_only_are_not_guessed_between(root: Path):
    Image.new("RGB", (9, 9)).save(root / "images" / "A.png")
    if len(os.listdir(root / "images")) < 4:
        pytest.skip("this disk does not tell upper from lower case")
    fixed = fix(root, line(turn(images=["a.PNG"])) + b"\n")

    assert fixed.errors_left == {"I101": 1}
    assert not fixed.is_changed


@pytest.mark.parametrize("path", ["/etc/hostname", "../../etc/hostname", "link/secret.png", "a\0b"])
def test_no_repair_leads_out_of_the_image_root(root: Path, path: str):
    (root / "secret.png").write_bytes((root / "images" / "a.png").read_bytes())
    (root / "images" / "link").symlink_to(root)
    fixed = fix(root, line(turn(images=[path])) + b"\n" + line(turn(images=["a.png"])), unsafe=True)

    assert fixed.num_dropped == 1


def test_an_absolute_path_into_the_image_root_becomes_relative(root: Path):
    fix(root, line(turn(images=[str(root / "images" / "val" / "c.png")])) + b"\n")

    assert (root / "x.fixed.jsonl").read_bytes() == line(turn(images=["val/c.png"])) + b"\n"


def test_a_taken_id_gets_the_next_free_number_and_the_same_sample_is_dropped(root: Path):
    def numbered(id: str, user: str) -> bytes:
        return line(turn(user=user), id=id)

    content = [
        numbered("a", "1"),
        numbered("a", "2"),
        numbered("a-2", "3"),
        b'{"id": "cut',
        numbered("a", "1").replace(b": ", b":"),
        numbered("a-2", "4"),
        numbered("a", "5"),
        numbered("a", "2"),
    ]
    fixed = fix(root, b"\n".join(content) + b"\n", unsafe=True)
    written = [json.loads(x) for x in (root / "x.fixed.jsonl").read_bytes().splitlines()]
    dropped = [json.loads(x) for x in (root / "x.dropped.jsonl").read_bytes().splitlines()]

    assert [(s["id"], s["conversations"][0]["user"]) for s in written] == [
        ("a", "1"),
        ("a-3", "2"),
        ("a-2", "3"),
        ("a-2-2", "4"),
        ("a-4", "5"),
    ]
    assert [(d["line"], d["code"]) for d in dropped] == [(4, "P101"), (5, "D101"), (8, "D101")]
    assert dropped[1]["content"].encode() == content[4]
    assert (fixed.fixed, fixed.dropped) == ({"D101": 3}, {"P101": 1, "D101": 2})
    assert codes(root / "x.fixed.jsonl") == set()


def test_a_safe_fix_leaves_taken_ids_and_says_so(root: Path):
    fixed = fix(root, GOOD + b"\n" + GOOD + b"\n")

    assert (fixed.is_changed, fixed.errors_left) == (False, {"D101": 1})


def test_an_id_is_free_again_when_the_sample_before_is_dropped(root: Path):
    bad = GOOD.replace(b'"a"', b'""')
    fix(root, bad + b"\n" + GOOD + b"\n", unsafe=True)

    assert (root / "x.fixed.jsonl").read_bytes() == GOOD + b"\n"


def test_in_place_keeps_the_file_and_every_older_backup(root: Path):
    path = root / "x.jsonl"
    first = line(id=1) + b"\n" + line(turn(assistant="")) + b"\n"
    fixed = fix(root, first, in_place=True, unsafe=True)
    assert path.read_bytes() == line(id="1") + b"\n"
    assert fixed.backup == f"{path}.bak"
    second = line(id=2) + b"\n" + line(turn(assistant=" ")) + b"\n"
    again = fix(root, second, in_place=True, unsafe=True)

    assert (again.backup, again.dropped_file) == (f"{path}.bak-2", str(root / "x.dropped-2.jsonl"))
    assert (root / "x.jsonl.bak").read_bytes() == first
    assert (root / "x.jsonl.bak-2").read_bytes() == second
    assert b'\\"\\"' in (root / "x.dropped.jsonl").read_bytes()


def test_in_place_a_file_without_faults_is_not_touched(root: Path):
    path = root / "x.jsonl"
    path.write_bytes(GOOD)
    before = path.stat()
    (fixed,) = fix_files([path], in_place=True).files

    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert (fixed.backup, fixed.is_changed) == (None, False)
    assert sorted(os.listdir(root)) == ["images", "x.jsonl"]


def test_in_place_follows_a_link_to_the_file(root: Path):
    (root / "real").mkdir()
    (root / "real" / "y.jsonl").write_bytes(line(id=1))
    (root / "x.jsonl").symlink_to(root / "real" / "y.jsonl")
    (fixed,) = fix_files([root / "x.jsonl"], in_place=True).files

    assert (root / "x.jsonl").is_symlink()
    assert (root / "real" / "y.jsonl").read_bytes() == line(id="1")
    assert fixed.backup == str(root / "real" / "y.jsonl.bak")


def test_files_go_to_out_dir_under_their_names(root: Path):
    for name in ("train", "val"):
        (root / f"{name}.jsonl").write_bytes(line(turn(images=["A.PNG"])) + b"\n")
    result = fix_files([root / "train.jsonl", root / "val.jsonl"], out_dir=root / "new" / "deep")

    assert sorted(os.listdir(root / "new" / "deep")) == ["train.jsonl", "val.jsonl"]
    assert [file.fixed for file in result.files] == [{"I101": 1}] * 2
    assert result.exit_status == 0
    assert codes(root / "new" / "deep" / "val.jsonl", images=root / "images") == set()


def test_a_list_of_dropped_lines_does_not_outlive_them(root: Path):
    fix(root, b"{\n", unsafe=True)
    assert (root / "x.dropped.jsonl").exists()
    fix(root, GOOD + b"\n", unsafe=True)

    assert not (root / "x.dropped.jsonl").exists()


def test_only_what_the_given_rules_find_is_repaired(root: Path):
    content = line(turn(assistant="a<|end|>", images=["A.PNG"])) + b"\n"
    fixed = fix(root, content, unsafe=True, rules=select_rules(ignore=("I",)))

    assert fixed.fixed == {"T102": 1}
    assert b"A.PNG" in (root / "x.fixed.jsonl").read_bytes()


def test_rules_may_differ_from_file_to_file(root: Path):
    for name in ("train", "val"):
        (root / f"{name}.jsonl").write_bytes(line(id=3) + b"\n")
    val = str(root / "val.jsonl")
    result = fix_files(
        [root / "train.jsonl", val],
        rules_for=lambda file: select_rules(ignore=("S",)) if file == val else select_rules(),
    )

    assert [file.fixed for file in result.files] == [{"S104": 1}, {}]


def test_answers_of_test_splits_may_be_left_out(root: Path):
    content = line(turn(assistant=" ", answers=[" "])) + b"\n"
    fix(root, content, unsafe=True, allow_missing_answer=True)

    assert (root / "x.fixed.jsonl").read_bytes() == line({"user": "u"}) + b"\n"


def test_a_wrong_image_root_drops_nothing(root: Path):
    (root / "other").mkdir()
    samples = [line(turn(images=[f"{i}.png"]), id=str(i)) for i in range(3)]
    with pytest.raises(ValueError, match=r"none of its images is under .*3 samples .*--images"):
        fix(root, b"\n".join(samples), unsafe=True, images=root / "other")

    assert sorted(os.listdir(root)) == ["images", "other", "x.jsonl"]


@pytest.mark.parametrize(
    ("paths", "options", "message"),
    [
        ([], {}, "no files to fix"),
        (["nope.jsonl"], {}, "nope.jsonl: no such file"),
        (["x.jsonl"], {"in_place": True, "out_dir": "o"}, "exclude each other"),
        (["x.jsonl", "x.jsonl"], {}, "written twice"),
        (["x.jsonl", "sub/x.jsonl"], {"out_dir": "o"}, "written twice"),
        (["x.jsonl"], {"out_dir": "."}, "is itself to be fixed"),
        (["x.jsonl", "x.fixed.jsonl"], {}, "is itself to be fixed"),
        (["x.jsonl"], {"images": "nowhere"}, "image root 'nowhere' is not a folder"),
    ],
)
def test_wrong_arguments_are_value_errors_and_write_nothing(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    paths: list[str],
    options: dict[str, Any],
    message: str,
):
    (root / "sub").mkdir()
    for name in ("x.jsonl", "x.fixed.jsonl", "sub/x.jsonl"):
        (root / name).write_bytes(line(id=1))
    monkeypatch.chdir(root)
    before = sorted(root.rglob("*"))
    with pytest.raises(ValueError, match=message):
        fix_files(paths, **options)

    assert sorted(root.rglob("*")) == before
    assert (root / "x.jsonl").read_bytes() == line(id=1)


def test_a_file_that_changes_meanwhile_is_not_replaced(root: Path):
    path = root / "x.jsonl"
    path.write_bytes(line(id=1) + b"\n")

    def append(done: int, total: int) -> None:
        with open(path, "ab") as file:
            file.write(GOOD + b"\n")

    with pytest.raises(ValueError, match="changed while it was fixed; nothing was written"):
        fix_files([path], in_place=True, progress=append)

    assert path.read_bytes().startswith(line(id=1) + b"\n" + GOOD)
    assert sorted(os.listdir(root)) == ["images", "x.jsonl"]


def test_progress_ends_at_the_size_of_all_files(root: Path):
    for name in ("train", "val"):
        (root / f"{name}.jsonl").write_bytes(b"\n".join(line(id=i) for i in range(30)))
    seen: list[tuple[int, int]] = []
    fix_files(
        [root / "train.jsonl", root / "val.jsonl"], progress=lambda *place: seen.append(place)
    )
    total = sum((root / f"{name}.jsonl").stat().st_size for name in ("train", "val"))

    assert seen == sorted(seen)
    assert seen[-1] == (total, total)


def test_hostile_lines_cost_no_more_than_their_length(root: Path):
    hostile = [
        b'{"a": "' + b'\\"' * 200_000,
        b"{" + b"," * 300_000,
        b'"' * 300_001,
        b", " * 200_000 + b"x",
        line(turn(user="<|e" * 40_000 + "nd|>" * 40_000 + "<|end|>")),
        line(turn(user="<|image_" + "9" * 4000 + "|>")),
        b'{"a": ' * 100_000,
    ]
    fixed = fix(root, b"\n".join(hostile), unsafe=True)

    assert fixed.num_lines == 7
    assert codes(root / "x.fixed.jsonl") == set()


# Any sample, with any of these done to its fields, its line, or its file.
_TEXT = st.sampled_from(
    ["a", "", " ", "a<|end|>", "<|image_1|>", "<|image_2|>b", "é", 3, 2.5, None]
)
_IMAGE = st.sampled_from(["a.png", "A.PNG", "val\\c.png", "gone.png", "../x", "./a.png", 1])
_KEY = st.sampled_from(["user", "assistant", "USER", "asistant", "answers", "images", "own"])
_TURN = st.dictionaries(
    _KEY, _TEXT | st.lists(_TEXT, max_size=2) | st.lists(_IMAGE, max_size=2), max_size=4
)
_SAMPLE = st.fixed_dictionaries(
    {"conversations": st.lists(st.just(turn()) | _TURN, max_size=2) | _TURN},
    optional={
        "id": st.sampled_from(["x", "y", "x-2", "", 3, None]),
        "source": st.sampled_from(["toy", "", 4]),
        "Source": st.just("toy"),
        "metadata": st.sampled_from([{"k": 1}, {"k": [1]}, {"k": float("nan")}, 3, None]),
        "own": st.sampled_from([1, [1], {"a": 1}]),
    },
)
_LINE = st.builds(
    lambda sample, change: change(json.dumps(sample, ensure_ascii=False).encode()),
    _SAMPLE
    | st.builds(
        lambda id, user: json.loads(line(turn(user=user), id=id)),
        st.sampled_from("xyz"),
        st.sampled_from("ab"),
    ),
    st.sampled_from(
        [
            lambda x: x,
            lambda x: x,
            lambda x: x + b",",
            lambda x: x[:-1] + b",}",
            lambda x: b"\xef\xbb\xbf" + x,
            lambda x: x[:-3],
            lambda x: x.replace(b"a", b"\xe9"),
            lambda x: x.replace(b"a", b"\t"),
            lambda x: b'{"id": "x", ' + x[1:],
            lambda x: b"",
            lambda x: x + b"\r",
        ]
    ),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lines=st.lists(_LINE, min_size=1, max_size=6), unsafe=st.booleans())
def test_a_second_fix_changes_nothing_and_valid_lines_stay(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], unsafe: bool
):
    assert_second_fix_changes_nothing(tmp_path_factory.mktemp("fix"), lines, unsafe)


@pytest.mark.slow
@pytest.mark.long
@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lines=st.lists(_LINE, min_size=1, max_size=12), unsafe=st.booleans())
def test_a_second_fix_changes_nothing_in_thousands_of_files(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], unsafe: bool
):
    assert_second_fix_changes_nothing(tmp_path_factory.mktemp("fix"), lines, unsafe)


def assert_second_fix_changes_nothing(folder: Path, lines: list[bytes], unsafe: bool) -> None:
    make_images(folder)
    # An image that is there: else the root would count as wrong.
    lines = [line(turn(images=["a.png"]), id="first"), *lines]
    (folder / "x.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    before = list(check([folder / "x.jsonl"]))
    (first,) = fix_files([folder / "x.jsonl"], unsafe=unsafe).files
    fixed = (folder / "x.fixed.jsonl").read_bytes()
    (second,) = fix_files([folder / "x.fixed.jsonl"], unsafe=unsafe).files
    of_data_set = [rule.code for rule in RULES if rule.subject == "dataset"]
    left = Counter(validate([folder / "x.fixed.jsonl"], ignore=of_data_set).counts)

    assert (folder / "x.fixed.fixed.jsonl").read_bytes() == fixed
    assert (second.is_changed, second.num_dropped, second.num_repaired) == (False, 0, 0)
    assert left == Counter(first.errors_left) + Counter(first.warnings_left)
    if unsafe:
        assert first.errors_left == {}
        assert first.num_lines - first.num_dropped == second.num_lines
    else:
        assert first.num_dropped == 0
    kept = Counter(x.rstrip(b"\r") for x in fixed.split(b"\n"))
    valid = Counter(checked.content for checked in before if checked.sample is not None)
    assert valid <= kept


def test_a_repaired_line_gives_way_to_a_valid_one_with_its_id(root: Path):
    valid, other = line(turn(user="1")), line(turn(user="2"))
    fix(root, valid + b",\n" + other + b",\n" + valid + b"\n", unsafe=True)
    (dropped,) = map(json.loads, (root / "x.dropped.jsonl").read_bytes().splitlines())

    assert (root / "x.fixed.jsonl").read_bytes() == (
        line(turn(user="2"), id="x-2") + b"\n" + valid + b"\n"
    )
    assert (dropped["line"], dropped["content"].encode()) == (1, valid + b",")
    assert dropped["reason"] == "id 'x' is used twice, by the same sample: line 3"


def test_a_safe_fix_keeps_the_sample_that_a_lenient_reader_saw(root: Path):
    """Python's json takes these lines as they are; what it saw must be in the file afterwards."""
    content = b'{"id": "x", ' + line(turn(images=["val/c.png"]), width=2)[1:] + b"\n"
    fix(root, content)
    sample = Sample.from_json((root / "x.fixed.jsonl").read_bytes())

    assert sample.conversations[0].images == ("val/c.png",)
    assert sample.metadata == {"width": 2}


@pytest.mark.slow
def test_memory_is_bounded_whatever_the_size_of_the_file(tmp_path: Path):
    text = "word " * 100
    with open(tmp_path / "x.jsonl", "wb") as file:
        for i in range(300_000):
            id = i if i % 10 == 0 else "same" if i % 1000 == 1 else str(i)
            file.write(line(turn(user=text), id=id) + b"\n")
    size_mb = (tmp_path / "x.jsonl").stat().st_size / 2**20
    script = """
        import sys
        from phi3v_data.fix_files import fix_files
        (fixed,) = fix_files([sys.argv[1]], unsafe=True).files
        print(fixed.num_repaired, fixed.num_dropped, int(peak_mb()))
    """
    output = run_measured(script, tmp_path / "x.jsonl")
    num_repaired, num_dropped, peak_mb = map(int, output.split())

    assert size_mb > 150
    assert (num_repaired, num_dropped) == (30_000, 299)  # 300 have one id, and are the same
    assert peak_mb < 200
