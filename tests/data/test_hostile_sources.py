"""What sources do that nobody meant well: names, references, files and rows of every built-in."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import phi3v_data
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from phi3v_data.convert import ConversionResult
from phi3v_data.converters import Converter
from phi3v_data.converters.chat_jsonl import ChatJsonl
from phi3v_data.converters.clip_folders import ClipFolders
from phi3v_data.converters.docvqa import DocVqa
from phi3v_data.converters.hateful_memes import HatefulMemes
from phi3v_data.converters.nlvr2 import Nlvr2
from phi3v_data.converters.ucf101 import Ucf101
from phi3v_data.schema import Sample

from tests.data.annotations import assert_valid, rejections, write_image
from tests.data.clips import truncate, write_clip
from tests.data.peak_memory import run_measured

# --- one good row of every converter of annotations, about a picture of the name given


def meme(number: int, image: str) -> dict[str, Any]:
    return {"id": number, "img": image, "label": 1, "text": "a text"}


def pair(number: int, image: str) -> dict[str, Any]:
    return {"identifier": f"train-{number}-0-0", "sentence": "A dog.", "label": "True"}


def page(number: int, image: str) -> dict[str, Any]:
    return {"questionId": number, "question": "What?", "image": image, "answers": ["a"]}


def chat(number: int, image: str) -> dict[str, Any]:
    messages = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    return {"id": number, "image": image, "conversations": messages}


Annotated = tuple[Converter, str, Callable[[int, str], dict[str, Any]]]

ANNOTATED: dict[str, Annotated] = {
    "hateful_memes": (HatefulMemes(), "train.jsonl", meme),
    "nlvr2": (Nlvr2(), "train.json", pair),
    "docvqa": (DocVqa(), "train_v1.0.json", page),
    "jsonl": (ChatJsonl(), "train.jsonl", chat),
}
NAMING = ("hateful_memes", "docvqa", "jsonl")
"""Their rows name a picture; nlvr2's are named by the identifier."""

every_annotated = pytest.mark.parametrize("name", ANNOTATED)
every_naming = pytest.mark.parametrize("name", NAMING)


def write_rows(root: Path, name: str, rows: list[bytes]) -> Path:
    """The annotations of a converter, in its own form, beside one picture for all good rows."""
    file_name = ANNOTATED[name][1]
    root.mkdir(parents=True, exist_ok=True)
    if name == "docvqa":
        content = b'{"data": [' + b",\n".join(rows) + b"]}"
    else:
        content = b"".join(row + b"\n" for row in rows)
    (root / file_name).write_bytes(content)
    write_image(root / "images/a.png")
    for number in (1, 2):
        for side in (0, 1):
            write_image(root / f"images/train-{number}-0-img{side}.png", number)
    return root


def good(name: str, number: int, image: str = "images/a.png") -> bytes:
    return json.dumps(ANNOTATED[name][2](number, image)).encode()


def convert(name: str, root: Path, out: Path) -> ConversionResult:
    """Convert; nothing but the output folder changes, and what comes out is sound."""
    before = snapshot(root.parent, out)
    result = phi3v_data.convert(ANNOTATED[name][0], root, out, num_workers=0)
    assert snapshot(root.parent, out) == before
    assert_sound(result)
    return result


def snapshot(folder: Path, out: Path) -> dict[str, tuple[int, int]]:
    """Size and time of everything below `folder` that is not in `out`; links are not followed."""
    found: dict[str, tuple[int, int]] = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if Path(parent, f) != out]
        for path in (Path(parent, name) for name in (*folders, *names)):
            facts = path.lstat()
            found[str(path)] = (facts.st_size, facts.st_mtime_ns)
    return found


def assert_sound(result: ConversionResult) -> None:
    """Every line is one JSON object, the counts hold, the validator finds no error."""
    for split, path in result.files.items():
        lines = path.read_bytes().splitlines()
        assert len(lines) == result.counts[split]
        assert all(isinstance(json.loads(line), dict) for line in lines)
    if result.rejected_file is not None:
        lines = result.rejected_file.read_text().splitlines()
        assert len(lines) == sum(result.rejected.values())
        assert all(text.isprintable() for line in lines for text in json.loads(line).values()
                   if isinstance(text, str))  # fmt: skip
    assert not result.faults
    assert "converter_error" not in result.rejected
    assert_valid(result, allow_missing_answer=True)


def samples_of(result: ConversionResult, split: str = "train") -> list[Sample]:
    return list(phi3v_data.read_samples(result.files[split]))


# --- names

TAKEN = (
    b"caf\xc3\xa9", b"cafe\xcc\x81",  # the same to look at: composed, and not
    "\uff21\uff22\uff23".encode(), b"ABC", b"abc",  # full width, and case
    b"-rf", b"--out_dir", b" space ", b"it's \"quoted\"", b"*?[a]", b"C:x", b"%s{classes}",
    "no\u00a0break".encode(), "\u0627\u0644".encode(), b"z" * 200,
)  # fmt: skip
REFUSED = (
    b"new\nline", b"bell\x07", b"esc\x1b[31m", b"tab\t", b"latin-\xe9", b"back\\slash",
    b"nel\xc2\x85", "line\u2028separator".encode(), b"new\\nline",
)  # fmt: skip


CLIPS = pytest.mark.parametrize("converter", [Ucf101(num_frames=4), ClipFolders(num_frames=4)],
                                ids=lambda converter: converter.name)  # fmt: skip


def put_clip(clip: Path, path: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    shutil.copyfile(clip, path)


@CLIPS
def test_any_readable_name_of_a_clip_is_taken_and_any_other_costs_that_clip_only(
    tmp_path: Path, converter: Converter
) -> None:
    clip = write_clip(tmp_path / "clip.avi")
    folder = os.fsencode(tmp_path / "src/train/Wave")
    for name in (*TAKEN, *REFUSED, b"y" * 250):
        put_clip(clip, folder + b"/" + name + b".avi")
    result = phi3v_data.convert(converter, tmp_path / "src", tmp_path / "out", num_workers=0)
    assert (result.counts, result.rejected) == (
        {"train": len(TAKEN)},
        {"bad_name": len(REFUSED) + 1},
    )
    assert_sound(result)
    stems = {os.fsdecode(name) for name in TAKEN}
    assert {Path(i).name.rsplit(".", 2)[0] for s in samples_of(result) for i in s.images} == stems


@CLIPS
def test_a_class_that_no_sample_can_name_is_not_in_the_question_of_the_others(
    tmp_path: Path, converter: Converter
) -> None:
    clip = write_clip(tmp_path / "clip.avi")
    tokens = (b"<|end|>", b"<|image_1|>", b"  ")
    for name in (*TAKEN, *REFUSED, *tokens):
        put_clip(clip, os.fsencode(tmp_path / "src/train") + b"/" + name + b"/a.avi")
    result = phi3v_data.convert(converter, tmp_path / "src", tmp_path / "out", num_workers=0)
    assert result.counts == {"train": len(TAKEN)}
    assert result.rejected == {"bad_name": len(REFUSED) + len(tokens)}
    assert_sound(result)
    labels = {os.fsdecode(name) for name in TAKEN}
    assert {s.conversations[0].assistant for s in samples_of(result)} == labels
    (question,) = {s.conversations[0].user for s in samples_of(result)}
    assert question.endswith(f": {', '.join(sorted(labels))}.")


@every_naming
def test_any_readable_name_of_a_picture_is_taken_as_it_is(tmp_path: Path, name: str) -> None:
    names = [f"images/{os.fsdecode(n)}.png" for n in TAKEN]
    rows = [good(name, number, image) for number, image in enumerate(names)]
    root = write_rows(tmp_path / "src", name, rows)
    for k, image in enumerate(names):
        write_image(root / image, color=k)
    result = convert(name, root, tmp_path / "out")
    assert not result.rejected
    assert [sample.images for sample in samples_of(result)] == [(image,) for image in names]
    for image in names:  # each its own, however alike the names
        assert (tmp_path / "out/images" / image).read_bytes() == (root / image).read_bytes()


@pytest.mark.parametrize("name", ANNOTATED)
def test_a_folder_of_annotations_with_a_bad_name_is_named_by_escapes(
    tmp_path: Path, name: str
) -> None:
    """A source that is one folder further down: its name is in every message."""
    root = tmp_path / "src" / os.fsdecode(b"new\nline\xff\x1b[31m")
    write_rows(root, name, [good(name, 1), b"{}", good(name, 2)])
    result = convert(name, tmp_path / "src", tmp_path / "out")
    assert result.counts == {"train": 2}
    assert len(rejections(result)) == 1
    (root / ANNOTATED[name][1]).write_bytes(b"no JSON")
    with pytest.raises(ValueError, match="is no JSON") as caught:
        list(ANNOTATED[name][0].discover(tmp_path / "src"))
    assert str(caught.value).isprintable()


# --- references to pictures

OUTSIDE = ("../secret.png", "images/../../secret.png", "/etc/hostname", "{root}/../secret.png",
           "file:///etc/hostname", "C:/secret.png", "..\\secret.png", "images/\0.png", "", ".", "/",
           "images", "x" * 5000, "images/" + "y/" * 3000 + "a.png")  # fmt: skip


@every_naming
def test_a_reference_out_of_the_source_costs_its_own_row_only(tmp_path: Path, name: str) -> None:
    secret = write_image(tmp_path / "secret.png", 7).read_bytes()
    root = tmp_path / "src"
    bad = [good(name, k, ref.format(root=root)) for k, ref in enumerate(OUTSIDE, 10)]
    write_rows(root, name, [good(name, 1), *bad, good(name, 2)])
    result = convert(name, root, tmp_path / "out")
    # A record of a conversation without an image is one without an image.
    is_taken = ["" in OUTSIDE and name == "jsonl"]
    assert result.counts == {"train": 2 + sum(is_taken)}
    assert sum(result.rejected.values()) == len(OUTSIDE) - sum(is_taken)
    written = [path for path in (tmp_path / "out/images").rglob("*") if path.is_file()]
    assert [path.name for path in written] == ["a.png"]
    assert written[0].read_bytes() != secret


SPECIAL = ("pipe.png", "device.png", "memory.png", "nowhere.png", "loop.png", "folder.png")


@every_naming
def test_pipes_and_devices_are_not_waited_for(tmp_path: Path, name: str) -> None:
    rows = [good(name, k, f"images/{special}") for k, special in enumerate(SPECIAL, 10)]
    root = write_rows(tmp_path / "src", name, [*rows, good(name, 1)])
    os.mkfifo(root / "images/pipe.png")
    os.symlink("/dev/zero", root / "images/device.png")
    os.symlink("/proc/self/mem", root / "images/memory.png")
    os.symlink("gone.png", root / "images/nowhere.png")
    os.symlink("loop.png", root / "images/loop.png")
    (root / "images/folder.png").mkdir()
    result = convert(name, root, tmp_path / "out")
    assert result.counts == {"train": 1}
    assert sum(result.rejected.values()) == len(SPECIAL)
    assert set(result.rejected) <= {"missing_image", "bad_image"}


def test_pipes_and_devices_among_clips_are_not_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "src/train/Wave"
    write_clip(folder / "good.avi")
    os.mkfifo(folder / "pipe.avi")
    os.symlink("/dev/zero", folder / "device.avi")
    os.symlink("gone.avi", folder / "nowhere.avi")
    (folder / "folder.avi").mkdir()
    for converter in (Ucf101(), ClipFolders()):
        out = tmp_path / converter.name
        result = phi3v_data.convert(converter, tmp_path / "src", out, num_workers=0)
        assert (result.counts, result.rejected) == ({"train": 1}, {"unreadable": 3})
        assert_sound(result)


@every_annotated
def test_a_pipe_in_the_place_of_the_annotations_is_refused(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path, name, [good(name, 1)])
    (tmp_path / ANNOTATED[name][1]).unlink()
    os.mkfifo(tmp_path / ANNOTATED[name][1])
    with pytest.raises(ValueError, match=r"no annotations found|no regular file"):
        list(ANNOTATED[name][0].discover(tmp_path))


@pytest.mark.parametrize("name", ["hateful_memes", "nlvr2", "docvqa"])
def test_a_pipe_in_the_place_of_parquet_is_refused(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="is no regular file"):
        list(ANNOTATED[name][0].discover(tmp_path))


@pytest.mark.parametrize("policy", ["copy", "link", "reencode"])
@every_naming
def test_a_link_is_followed_and_a_file_of_its_own_comes_out(
    tmp_path: Path, name: str, policy: Any
) -> None:
    """As in a hub's cache, where every file is a link to a blob."""
    blob = write_image(tmp_path / "blobs/5f3a", 7)
    root = write_rows(tmp_path / "src", name, [good(name, 1, "images/linked.png")])
    os.symlink(blob, root / "images/linked.png")
    converter = type(ANNOTATED[name][0])(images=policy)  # pyright: ignore[reportCallIssue]
    result = phi3v_data.convert(converter, root, tmp_path / "out", num_workers=0)
    assert result.counts == {"train": 1}
    (image,) = samples_of(result)[0].images
    assert not (tmp_path / "out/images" / image).is_symlink()
    assert_sound(result)


@every_naming
def test_a_name_that_no_file_can_have_costs_its_own_row_only(tmp_path: Path, name: str) -> None:
    long = "é" * 126 + ".p"  # 254 bytes: the picture's own name fits, nothing longer does
    rows = [good(name, 1), good(name, 2, f"images/{long}"), good(name, 3)]
    root = write_rows(tmp_path / "src", name, rows)
    write_image(root / "images" / long)
    converter = type(ANNOTATED[name][0])(images="reencode")  # pyright: ignore[reportCallIssue]
    result = phi3v_data.convert(converter, root, tmp_path / "out", num_workers=0)
    assert (result.counts, result.rejected) == ({"train": 2}, {"bad_name": 1})
    assert_sound(result)


# --- rows

DEEP = b'{"deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BROKEN: dict[str, bytes] = {
    "bad_utf8": b'{"text": "caf\xe9"}',
    "bad_unicode": b'{"text": "\\ud83d"}',
    "duplicate_key": b'{"a": 1, "b": 2, "a": 3}',
    "bad_json nan": b'{"label": NaN}',
    "bad_json infinity": b'{"label": -Infinity}',
    "bad_json huge": b'{"id": ' + b"9" * 5000 + b"}",
    "bad_json deep": DEEP,
    "bad_json control": b'{"text": "a\x00b"}',
    "bad_json quote": b"{'text': 'a'}",
    "not_object number": b"7",
    "not_object null": b"null",
    "not_object list": b'["a"]',
}


@pytest.mark.parametrize("kind", BROKEN)
@every_annotated
def test_a_row_that_is_no_json_object_is_one_line_and_nothing_good_is_lost(
    tmp_path: Path, name: str, kind: str
) -> None:
    root = write_rows(tmp_path / "src", name, [good(name, 1), BROKEN[kind], good(name, 2)])
    result = convert(name, root, tmp_path / "out")
    assert result.counts == {"train": 2}
    ((reason, detail),) = rejections(result)
    assert reason == kind.split()[0]
    place = "[1] (line 2)" if name == "docvqa" else ":2"
    assert detail.startswith(f"{ANNOTATED[name][1]}{place}: ")
    assert len(detail) < 300


@every_annotated
def test_a_broken_first_row_costs_no_other(tmp_path: Path, name: str) -> None:
    for k, first in enumerate(
        (b'{"id": "cut o', b'cut off"}', b"\xfd\xfe", b"NaN", *BROKEN.values())
    ):
        rows = [first, good(name, 1), good(name, 2)]
        if name == "docvqa" and first in (b'{"id": "cut o', b'cut off"}'):
            continue  # an open quote hides where the next row starts
        result = convert(name, write_rows(tmp_path / f"{k}/src", name, rows), tmp_path / f"{k}/out")
        assert result.counts == {"train": 2}, first
        assert sum(result.rejected.values()) == 1


@every_annotated
def test_a_byte_order_mark_blank_lines_and_crlf_take_no_row_away(tmp_path: Path, name: str) -> None:
    root = write_rows(tmp_path / "src", name, [good(name, 1), b"", b" \t\r", good(name, 2)])
    path = root / ANNOTATED[name][1]
    content = path.read_bytes().replace(b",\n,\n \t\r,", b",\n\n")  # no rows between in an array
    path.write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    result = convert(name, root, tmp_path / "out")
    assert (result.counts, result.rejected) == ({"train": 2}, {})


@every_annotated
def test_a_file_cut_off_in_its_last_row_keeps_all_before_it(tmp_path: Path, name: str) -> None:
    root = write_rows(tmp_path / "src", name, [good(name, 1), good(name, 2), good(name, 3)])
    path = root / ANNOTATED[name][1]
    path.write_bytes(path.read_bytes()[:-20])
    result = convert(name, root, tmp_path / "out")
    assert result.counts == {"train": 2}
    assert result.rejected == {"bad_json": 1} | ({"truncated": 1} if name == "docvqa" else {})


@pytest.mark.parametrize("name", ["hateful_memes", "nlvr2", "docvqa"])
def test_a_repeated_id_is_named_and_a_broken_row_takes_no_id(tmp_path: Path, name: str) -> None:
    broken = good(name, 1).replace(b"}", b', "x": NaN}')
    infinite = good(name, 2).replace(b"}", b', "x": 1e999}')  # Python reads it, others do not
    rows = [broken, good(name, 1), good(name, 1), infinite, infinite]
    result = convert(name, write_rows(tmp_path / "src", name, rows), tmp_path / "out")
    assert result.counts == {"train": 2}
    assert [reason for reason, _ in rejections(result)] == [
        "bad_json", "duplicate_id", "duplicate_id",
    ]  # fmt: skip


@pytest.mark.parametrize("number", [10**30, -1, 1.5, True, [], {}, "", " ", None])
@pytest.mark.parametrize("name", ["hateful_memes", "docvqa", "jsonl"])
def test_an_odd_id_gives_a_valid_sample_or_a_reason(
    tmp_path: Path, name: str, number: object
) -> None:
    row = json.loads(good(name, 1))
    row["questionId" if name == "docvqa" else "id"] = number
    rows = [json.dumps(row).encode()] * 2
    result = convert(name, write_rows(tmp_path / "src", name, rows), tmp_path / "out")
    assert result.counts["train"] + sum(result.rejected.values()) == 2
    if name != "jsonl" and number == 10**30:
        assert result.rejected == {"duplicate_id": 1}


@every_annotated
def test_values_of_other_types_cost_their_own_row_only(tmp_path: Path, name: str) -> None:
    odd = (
        None,
        True,
        0,
        1e308,
        "",
        "\u2028",
        "<|end|>",
        [],
        [None],
        {},
        {"a": {"b": []}},
        "x" * 100_000,
    )
    rows: list[bytes] = []
    for key in ANNOTATED[name][2](1, "images/a.png"):
        for k, value in enumerate(odd):
            row = ANNOTATED[name][2](1000 + 100 * len(rows) + k, "images/a.png")
            rows.append(json.dumps(row | {key: value}).encode())
    root = write_rows(tmp_path / "src", name, [good(name, 1), *rows, good(name, 2)])
    result = convert(name, root, tmp_path / "out")
    ids = [sample.id for sample in samples_of(result)]
    assert len(ids) == result.counts["train"] >= 2
    assert result.counts["train"] + sum(result.rejected.values()) >= len(rows) + 2
    assert all(len(detail) < 400 for _, detail in rejections(result))


# --- Parquet

CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TEXT = pa.struct([("user", pa.string()), ("assistant", pa.string()), ("source", pa.string())])
CAULDRON = pa.schema([("images", pa.list_(CELL)), ("texts", pa.list_(TEXT))])
HUB = pa.schema([
    ("questionId", pa.string()), ("question", pa.string()), ("image", CELL),
    ("answers", pa.list_(pa.string())),
])  # fmt: skip


def cauldron(number: int, num_images: int, content: bytes) -> dict[str, Any]:
    text = {"user": f"What is {number}?", "assistant": "It.", "source": "x"}
    return {"images": [{"bytes": content, "path": None}] * num_images, "texts": [text]}


def hub(number: int, content: bytes) -> dict[str, Any]:
    cell = {"bytes": content, "path": None}
    return {"questionId": str(number), "question": "What?", "image": cell, "answers": ["a"]}


PARQUET: dict[str, tuple[Converter, pa.Schema, Callable[[int, bytes], dict[str, Any]]]] = {
    "hateful_memes": (HatefulMemes(), CAULDRON, lambda k, content: cauldron(k, 1, content)),
    "nlvr2": (Nlvr2(), CAULDRON, lambda k, content: cauldron(k, 2, content)),
    "docvqa cauldron": (DocVqa(), CAULDRON, lambda k, content: cauldron(k, 1, content)),
    "docvqa hub": (DocVqa(), HUB, hub),
}
every_parquet = pytest.mark.parametrize("form", PARQUET)


def picture(tmp_path: Path) -> bytes:
    """One that does not compress, so that most of a file is its pages."""
    from PIL import Image

    path = tmp_path / "noise.png"
    Image.frombytes("RGB", (24, 24), np.random.default_rng(0).bytes(24 * 24 * 3)).save(path)
    return path.read_bytes()


def write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=4, compression="none")
    return path


@every_parquet
def test_damage_anywhere_in_a_parquet_file_is_named_and_no_crash(tmp_path: Path, form: str) -> None:
    converter, schema, make = PARQUET[form]
    content = picture(tmp_path)
    path = write_table(
        tmp_path / "src/train.parquet", [make(k, content) for k in range(12)], schema
    )
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    starts = [0, 4, 8, *rng.integers(0, len(whole), 30).tolist(), len(whole) - 8, len(whole) - 4]
    for k, start in enumerate(starts):
        damaged = bytearray(whole)
        for place in range(start, min(start + 16, len(whole))):
            damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        assert_sound_or_refused(converter, tmp_path / "src", tmp_path / f"out{k}")


def assert_sound_or_refused(converter: Converter, source: Path, out: Path) -> int:
    """Either the file is refused by its name, or what comes out is sound: how many samples."""
    try:
        result = phi3v_data.convert(converter, source, out, num_workers=0)
    except ValueError as error:
        message = str(error)
    else:
        assert_sound(result)
        return result.counts["train"]
    assert "train.parquet" in message
    assert message.isprintable()
    return 0


@every_parquet
def test_a_parquet_file_cut_off_anywhere_is_refused_by_name(tmp_path: Path, form: str) -> None:
    converter, schema, make = PARQUET[form]
    rows = [make(k, picture(tmp_path)) for k in range(4)]
    path = write_table(tmp_path / "src/train.parquet", rows, schema)
    whole = path.read_bytes()
    for size in (0, 3, 4, 12, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"train\.parquet is damaged or no Parquet file"):
            list(converter.discover(tmp_path / "src"))


@every_parquet
def test_nulls_everywhere_cost_their_own_rows_only(tmp_path: Path, form: str) -> None:
    converter, schema, make = PARQUET[form]
    content = picture(tmp_path)
    base = make(7, content)
    rows: list[dict[str, Any]] = [dict.fromkeys(base)]
    for key, value in base.items():
        rows.append(base | {key: None})
        if isinstance(value, list):
            rows += [base | {key: []}, base | {key: [None]}, base | {key: [None] * 3}]
        for inner in (
            [value] if isinstance(value, dict) else value if isinstance(value, list) else []
        ):
            if isinstance(inner, dict):
                emptied = [dict.fromkeys(inner)] + [inner | {name: None} for name in inner]
                rows += [base | {key: [e] if isinstance(value, list) else e} for e in emptied]
    whole = [make(1, content), make(2, content)]
    write_table(tmp_path / "src/train.parquet", [whole[0], *rows, whole[1]], schema)
    result = phi3v_data.convert(converter, tmp_path / "src", tmp_path / "out", num_workers=0)
    assert_sound(result)
    ids = [sample.id for sample in samples_of(result)]
    assert len(ids) >= 2
    assert {ids[0], ids[-1]} == (
        {"train-1", "train-2"} if form == "docvqa hub"
        else {"train-0000000", f"train-{len(rows) + 1:07d}"}
    )  # fmt: skip


WRONG_TYPES = (
    pa.int64(), pa.bool_(), pa.string(), pa.binary(), pa.list_(pa.int32()), pa.null(),
    pa.struct([("a", pa.int8())]), pa.list_(pa.list_(pa.string())), pa.date32(),
    pa.map_(pa.string(), pa.string()), pa.list_(pa.struct([("x", pa.int64())])), pa.float32(),
)  # fmt: skip


@pytest.mark.parametrize("kind", WRONG_TYPES, ids=str)
@every_parquet
def test_columns_of_another_type_are_named_and_no_crash(
    tmp_path: Path, form: str, kind: pa.DataType
) -> None:
    converter, schema, _ = PARQUET[form]
    value = {
        "int64": 3, "bool": True, "string": "a", "binary": b"\xff\xfe", "list<element: int32>": [1],
    }.get(str(kind))  # fmt: skip
    for k, column in enumerate(schema.names):
        types = {name: schema.field(name).type for name in schema.names} | {column: kind}
        row = {name: value if name == column else None for name in schema.names}
        path = tmp_path / f"{k}/src/train.parquet"
        write_table(path, [row, row], pa.schema(list(types.items())))
        assert not assert_sound_or_refused(converter, path.parent, tmp_path / f"{k}/out")


# --- videos


def claim_frames(path: Path, count: int) -> Path:
    """Rewrite how many frames an AVI file says it has, in both of its headers."""
    content = bytearray(path.read_bytes())
    for chunk, offset in ((b"avih", 16), (b"strh", 32)):
        start = content.index(chunk) + 8 + offset
        content[start : start + 4] = count.to_bytes(4, "little")
    path.write_bytes(content)
    return path


@CLIPS
def test_files_that_are_no_whole_video_are_named_and_cost_no_other(
    tmp_path: Path, converter: Converter
) -> None:
    folder = tmp_path / "src/train/Wave"
    clip = write_clip(folder / "good.avi")
    (folder / "empty.avi").touch()
    (folder / "text.avi").write_text("not a video\n" * 100)
    (folder / "playlist.avi").write_text("ffconcat version 1.0\nfile good.avi\n")
    (folder / "zeros.avi").write_bytes(bytes(100_000))
    (folder / "riff.avi").write_bytes(b"RIFF\xff\xff\xff\xffAVI LIST" + b"\xff" * 1000)
    for k, fraction in enumerate((0.01, 0.3, 0.9)):
        truncate(Path(shutil.copyfile(clip, folder / f"cut{k}.avi")), fraction)
    result = phi3v_data.convert(converter, tmp_path / "src", tmp_path / "out", num_workers=0)
    assert result.counts == {"train": 1}
    assert set(result.rejected) <= {"unreadable", "truncated", "no_frames"}
    assert sum(result.rejected.values()) == 8
    assert_sound(result)


@pytest.mark.parametrize("count", [0, 1, 10_000_000, 2**31 - 1, 2**32 - 1])
@CLIPS
def test_a_header_that_lies_about_its_frames_changes_nothing(
    tmp_path: Path, converter: Converter, count: int
) -> None:
    """Ten million frames are more than 50 hours."""
    for name in ("said", "true"):
        write_clip(tmp_path / name / "train/Wave/a.avi", 12)
    claim_frames(tmp_path / "said/train/Wave/a.avi", count)
    said, true = (
        phi3v_data.convert(converter, tmp_path / name, tmp_path / f"{name}-out", num_workers=0)
        for name in ("said", "true")
    )
    assert said.counts == true.counts == {"train": 1}
    assert_sound(said)
    for image in samples_of(true)[0].images:
        pictures = [(r.out_dir / "images" / image).read_bytes() for r in (said, true)]
        assert pictures[0] == pictures[1]


READ_CLIP = """
    import sys
    from pathlib import Path
    from phi3v_data.converters.ucf101 import Ucf101
    converter = Ucf101()
    (item,) = converter.discover(Path(sys.argv[1]))
    (sample,) = converter.convert(item, Path(sys.argv[1]) / "out")
    print(len(sample.images), peak_mb())
"""


@pytest.mark.parametrize(
    "num_seconds", [60, pytest.param(1200, marks=[pytest.mark.slow, pytest.mark.long])]
)
def test_memory_does_not_grow_with_the_length_of_a_clip(tmp_path: Path, num_seconds: int) -> None:
    """Its header says fifty hours."""
    import cv2

    path = tmp_path / "long/train/Wave/a.avi"
    path.parent.mkdir(parents=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25, (320, 240))
    frame = np.zeros((240, 320, 3), dtype=np.uint8)
    for _ in range(25 * num_seconds):
        writer.write(frame)
    writer.release()
    claim_frames(path, 50 * 3600 * 25)
    write_clip(tmp_path / "short/train/Wave/a.avi")
    peaks: list[float] = []
    for name in ("short", "long"):
        num_images, peak = run_measured(READ_CLIP, tmp_path / name).split()
        assert int(num_images) == 8
        peaks.append(float(peak))
    assert peaks[1] - peaks[0] < 40  # all frames of the shorter one take 330 MiB


# --- many files

LIST = """
    import sys, time
    from pathlib import Path
    from phi3v_data.converters import get_converter
    for name in sys.argv[2:]:
        start = time.perf_counter()
        items = get_converter(name).discover(Path(sys.argv[1], name))
        print(sum(1 for _ in items), time.perf_counter() - start, peak_mb())
"""

EVERY = [*ANNOTATED, "ucf101", "video"]


def measure_listing(root: Path, names: list[str], count: int) -> list[tuple[int, float, float]]:
    """(items, seconds, peak in MiB) of sources that have a folder of `count` files."""
    for name in names:
        if name in ANNOTATED:
            write_rows(root / name, name, [good(name, 1)])
        else:
            (root / name / "train/Wave").mkdir(parents=True)
        folder = root / name / ("images" if name in ANNOTATED else "train/Wave")
        ending = ".png" if name in ANNOTATED else ".avi"
        for k in range(count):
            os.mknod(folder / f"file{k:06}{ending}")
    lines = [line.split() for line in run_measured(LIST, root, *names).splitlines()]
    return [(int(items), float(seconds), float(peak)) for items, seconds, peak in lines]


def test_a_folder_of_many_files_is_listed_at_once(tmp_path: Path) -> None:
    found = measure_listing(tmp_path, EVERY, 3000)
    assert [num_items for num_items, _, _ in found] == [1, 1, 1, 1, 3000, 3000]
    assert sum(seconds for _, seconds, _ in found) < 20
    assert max(peak for _, _, peak in found) < 200


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", EVERY)
def test_a_folder_of_100_000_files_is_listed_in_seconds_and_little_memory(
    tmp_path: Path, name: str
) -> None:
    ((num_items, seconds, peak),) = measure_listing(tmp_path, [name], 100_000)
    assert num_items == (1 if name in ANNOTATED else 100_000)
    assert seconds < 30
    assert peak < 250


# --- a gigabyte of annotations; hateful_memes and docvqa have theirs beside their other tests

READ_ANNOTATIONS = """
    import sys
    from pathlib import Path
    from phi3v_data.converters import get_converter
    converter, source = get_converter(sys.argv[1]), Path(sys.argv[2])
    items = list(converter.discover(source))
    found = [r for item in (items[0], items[-1]) for r in converter.convert(item, source / "out")]
    print(len(items), len(found), peak_mb())
"""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("form", ["lines", "array"])
@pytest.mark.parametrize("name", ["nlvr2", "jsonl"])
def test_a_gigabyte_of_annotations_takes_less_than_300_mb(
    tmp_path: Path, name: str, form: str
) -> None:
    row = ANNOTATED[name][2](10**8, "images/gone.png") | {"more": "word " * 400}
    head, tail = json.dumps(row).split(str(10**8))[:2]
    opening, between, closing = ("", "\n", "\n") if form == "lines" else ("[", ",\n", "]\n")
    with open(tmp_path / ANNOTATED[name][1], "w") as file:
        file.write(opening)
        for k in range(500_000):
            file.write(f"{between if k else ''}{head}{10**8 + k}{tail}")
        file.write(closing)
    assert (tmp_path / ANNOTATED[name][1]).stat().st_size > 1_000_000_000
    num_items, num_found, peak = run_measured(READ_ANNOTATIONS, name, tmp_path).split()
    assert int(num_items) > 1000
    assert int(num_found) > 200
    assert float(peak) < 300
