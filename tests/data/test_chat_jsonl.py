import base64
import json
import os
from pathlib import Path
from typing import Any

import phi3v_data
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phi3v_data.convert import ConversionResult
from phi3v_data.converters import Rejected, get_converter
from phi3v_data.converters.chat_jsonl import ChatJsonl
from phi3v_data.jsonl import read_samples
from phi3v_data.rules import IMAGE_MARK
from phi3v_data.schema import Sample, Turn
from PIL import Image

from tests.data.annotations import rejections, write_image
from tests.data.clips import decode_all, truncate, write_clip
from tests.data.peak_memory import run_measured

PICTURES = ("a.png", "b.png", "c.png")


def write_source(root: Path, *rows: Any, name: str = "train.jsonl") -> Path:
    """An annotation file beside `images/{a,b,c}.png`."""
    for number, picture in enumerate(PICTURES):
        write_image(root / "images" / picture, number)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (root / name).write_text("".join(line + "\n" for line in lines))
    return root


def run(source: Path, out_dir: Path, **options: Any) -> ConversionResult:
    workers = options.pop("num_workers", 0)
    return phi3v_data.convert(ChatJsonl(**options), source, out_dir, num_workers=workers)


def samples_of(result: ConversionResult, split: str = "train") -> list[Sample]:
    return list(read_samples(result.files[split], allow_missing_answer=True))


def convert_rows(tmp_path: Path, *rows: Any, **options: Any) -> list[Sample | Rejected]:
    converter = ChatJsonl(**options)
    source = write_source(tmp_path / "src", *rows)
    items = list(converter.discover(source))
    return [r for item in items for r in converter.convert(item, tmp_path / "out")]


def turns_of(tmp_path: Path, row: dict[str, Any], **options: Any) -> tuple[Turn, ...]:
    (sample,) = convert_rows(tmp_path, row, **options)
    assert isinstance(sample, Sample), sample
    return sample.conversations


def rejection_of(tmp_path: Path, row: Any, **options: Any) -> Rejected:
    (rejected,) = convert_rows(tmp_path, row, **options)
    assert isinstance(rejected, Rejected), rejected
    return rejected


def llava(*texts: str, **fields: Any) -> dict[str, Any]:
    roles = ("human", "gpt")
    turns = [{"from": roles[k % 2], "value": text} for k, text in enumerate(texts)]
    return {**fields, "conversations": turns}


def chat(*contents: Any, **fields: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    turns = [{"role": roles[k % 2], "content": content} for k, content in enumerate(contents)]
    return {"messages": turns, **fields}


def assert_valid(result: ConversionResult, **options: Any) -> None:
    report = phi3v_data.validate(list(result.files.values()), **options)
    assert not [d for d in report.diagnostics if d.severity == "error"], report.diagnostics


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# --- the forms -----------------------------------------------------------------------------------


def test_a_line_of_llava_becomes_a_sample(tmp_path: Path) -> None:
    row = llava("<image>\nWhat is it?", "A cat.", "Sure?", "Yes.", id="000033471", image="a.png")
    result = run(write_source(tmp_path / "src", row), tmp_path / "out")
    turns = [
        {"images": ["a.png"], "user": "What is it?", "assistant": "A cat."},
        {"images": [], "user": "Sure?", "assistant": "Yes."},
    ]
    assert json.loads(samples_of(result)[0].to_json()) == {
        "id": "train-0000000000", "source": "jsonl", "conversations": turns,
        "metadata": {"id": "000033471"},
    }  # fmt: skip
    source = (tmp_path / "src/images/a.png").read_bytes()
    assert (tmp_path / "out/images/a.png").read_bytes() == source
    assert_valid(result)


ONE_QUESTION: dict[str, Any] = {
    "llava": llava("<image>\nWhat?", "A cat.", image="a.png"),
    "llava, list": llava("<image>\nWhat?", "A cat.", image=["a.png"]),
    "llava, picture last": llava("What?", "A cat.", image="a.png"),
    "llama-factory": llava("<image>What?", "A cat.", images=["a.png"]),
    "llama-factory, roles": chat("<image>What?", "A cat.", images=["a.png"]),
    "llama-factory, alpaca": {"instruction": "<image>What?", "input": "", "output": "A cat.",
                              "images": ["a.png"]},
    "ms-swift, path objects": chat("<image>What?", "A cat.", images=[{"path": "a.png"}]),
    "ms-swift, no placeholder": chat("What?", "A cat.", images=["a.png"]),
    "ms-swift, sharegpt": {"conversation": [{"human": "<image>What?", "assistant": "A cat."}],
                           "images": "a.png"},
    "ms-swift, query": {"query": "<image>What?", "response": "A cat.", "images": ["a.png"]},
    "openai": chat([{"type": "image_url", "image_url": {"url": "a.png"}},
                    {"type": "text", "text": "What?"}], "A cat."),
    "openai, answer in entries": chat(
        [{"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": "What?"}],
        [{"type": "output_text", "text": "A cat."}]),
    "transformers": chat([{"type": "image", "image": "a.png", "text": None},
                          {"type": "text", "text": "What?", "image": None}], "A cat."),
    "trl": chat([{"type": "image"}, {"type": "text", "text": "What?"}], "A cat.",
                images=["a.png"]),
    "transformers, url": chat([{"type": "image", "url": "./a.png"},
                               {"type": "text", "text": "What?"}], "A cat."),
}  # fmt: skip


@pytest.mark.parametrize("form", ONE_QUESTION)
def test_one_question_about_one_picture_is_the_same_sample_in_every_form(
    tmp_path: Path, form: str
) -> None:
    expected = (Turn(images=("a.png",), user="What?", assistant="A cat."),)
    assert turns_of(tmp_path, ONE_QUESTION[form]) == expected


def test_history_and_input_of_alpaca_become_turns(tmp_path: Path) -> None:
    row = {
        "instruction": "Name it.", "input": "In French.", "output": "Un chat.",
        "history": [["<image>What?", "A cat."]], "images": ["a.png"],
    }  # fmt: skip
    assert turns_of(tmp_path, row) == (
        Turn(images=("a.png",), user="What?", assistant="A cat."),
        Turn(user="Name it.\nIn French.", assistant="Un chat."),
    )


def test_a_record_without_pictures_stays_one(tmp_path: Path) -> None:
    assert turns_of(tmp_path, llava(" Hi ", "Hello. ")) == (Turn(user=" Hi ", assistant="Hello. "),)


# --- where pictures stand ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<image>\n<image>\nCompare.", "Compare."),
        ("<image><image>Compare.", "Compare."),
        (" \n<image>\n<image> Compare.", "Compare."),
        ("<image>\n<image>", ""),
        ("Compare.\n<image><image>", "Compare.\n<|image_1|><|image_2|>"),
        ("<image>\nand <image>?", "<|image_1|>\nand <|image_2|>?"),
        ("A: <image>\nB: <image>\nSame?", "A: <|image_1|>\nB: <|image_2|>\nSame?"),
    ],
)
def test_leading_pictures_come_first_and_others_are_placed_by_marks(
    tmp_path: Path, text: str, expected: str
) -> None:
    (turn,) = turns_of(tmp_path, llava(text, "Yes.", image=["b.png", "a.png"]))
    assert turn.images == ("b.png", "a.png")
    assert turn.user == expected


def test_pictures_go_to_the_turn_that_names_them_and_marks_count_within_it(tmp_path: Path) -> None:
    row = llava("<image>One?", "A.", "And <image>?", "B.", "<image>", "C.", image=[*PICTURES])
    assert turns_of(tmp_path, row) == (
        Turn(images=("a.png",), user="One?", assistant="A."),
        Turn(images=("b.png",), user="And <|image_1|>?", assistant="B."),
        Turn(images=("c.png",), user="", assistant="C."),
    )


def test_entries_of_content_are_joined_by_line_breaks(tmp_path: Path) -> None:
    content = [
        {"type": "text", "text": "First"},
        {"type": "image", "image": "a.png"},
        {"type": "image", "image": "b.png"},
        {"type": "text", "text": "second"},
        "third",
    ]
    (turn,) = turns_of(tmp_path, chat(content, "Yes."))
    assert turn.user == "First\n<|image_1|><|image_2|>\nsecond\nthird"
    assert turn.images == ("a.png", "b.png")


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        (llava("<image>What?", "A."), "1 places for 0 image(s)"),
        (llava("<image>What?", "A.", image=["a.png", "b.png"]), "1 places for 2 image(s)"),
        (llava("<image><image>What?", "A.", image="a.png"), "2 places for 1 image(s)"),
        (llava("<image>?", "A.", images=["a.png"], videos=["a.mp4"]), "0 places for 1 video(s)"),
        (llava("<video>?", "A.", image="a.png"), "0 places for 1 image(s)"),
    ],
)
def test_placeholders_must_match_the_media(
    tmp_path: Path, row: dict[str, Any], detail: str
) -> None:
    assert rejection_of(tmp_path, row) == Rejected("placeholders", f"train.jsonl:1: {detail}")


# --- system messages, splits without answers -----------------------------------------------------


def with_system(form: str) -> dict[str, Any]:
    row = chat("<image>\nWhat?", "A cat.", images=["a.png"])
    if form == "message":
        row["messages"].insert(0, {"role": "system", "content": "Be brief."})
        return row
    return {**row, "system": "Be brief."}


@pytest.mark.parametrize("form", ["message", "key"])
def test_a_system_message_is_the_first_paragraph_by_default(tmp_path: Path, form: str) -> None:
    (turn,) = turns_of(tmp_path, with_system(form))
    assert turn == Turn(images=("a.png",), user="Be brief.\n\nWhat?", assistant="A cat.")
    (turn,) = turns_of(tmp_path / "drop", with_system(form), system="drop")
    assert turn.user == "What?"
    rejected = rejection_of(tmp_path / "reject", with_system(form), system="reject")
    assert rejected.reason == "system_message"


def test_a_system_message_leaves_interleaved_pictures_where_they_are(tmp_path: Path) -> None:
    row = chat("<image> or <image>?", "A.", images=["a.png", "b.png"], system="Choose.")
    (turn,) = turns_of(tmp_path, row)
    assert turn.images == ("a.png", "b.png")
    assert turn.user == "Choose.\n\n<|image_1|> or <|image_2|>?"


def test_only_test_splits_may_lack_the_last_answer(tmp_path: Path) -> None:
    row = llava("<image>What?", image="a.png")
    source = write_source(tmp_path / "src", row, name="test.jsonl")
    write_source(source, row, name="train.jsonl")
    result = run(source, tmp_path / "out")
    assert result.counts == {"train": 0, "test": 1}
    assert samples_of(result, "test")[0].conversations[0].assistant is None
    assert rejections(result)[0][0] == "no_answer"
    assert_valid(result, allow_missing_answer=True)


# --- videos --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [{"video": "clips/1.avi"}, {"videos": ["clips/1.avi"]}, {"video": {"path": "clips/1.avi"}}],
)
@pytest.mark.parametrize("placeholder", ["<video>\n", "<image>\n", ""])
def test_a_video_gives_the_frames_of_a_full_decode(
    tmp_path: Path, fields: dict[str, Any], placeholder: str
) -> None:
    path = write_clip(tmp_path / "src/clips/1.avi", 9)
    (turn,) = turns_of(tmp_path, llava(f"{placeholder}What?", "A.", **fields), num_frames=3)
    assert turn.images == tuple(f"clips/1.avi.{k}.jpg" for k in range(3))
    assert turn.user == "What?"
    for k, frame in enumerate(decode_all(path)[::3]):
        Image.fromarray(frame[:, :, ::-1]).save(tmp_path / "expected.jpg", "JPEG")
        written = (tmp_path / "out/images" / turn.images[k]).read_bytes()
        assert written == (tmp_path / "expected.jpg").read_bytes()


def test_pictures_and_a_video_in_one_turn_keep_their_order(tmp_path: Path) -> None:
    write_clip(tmp_path / "src/1.avi")
    row = chat("Is <image> in <video>?", "Yes.", images=["a.png"], videos=["1.avi"])
    (turn,) = turns_of(tmp_path, row, num_frames=2)
    assert turn.user == "Is <|image_1|> in <|image_2|><|image_3|>?"
    assert turn.images == ("a.png", "1.avi.0.jpg", "1.avi.1.jpg")


def test_a_list_of_frames_is_a_video(tmp_path: Path) -> None:
    row = chat("<video>What?", "A.", videos=[["a.png", "b.png", "c.png"]])
    for short, count, images in (
        ("repeat", 2, ("a.png", "b.png")),
        ("repeat", 4, ("a.png", "a.png", "b.png", "c.png")),
        ("fewer", 8, PICTURES),
    ):
        (turn,) = turns_of(tmp_path, row, num_frames=count, short=short)
        assert turn.images == images
    assert rejection_of(tmp_path, row, short="reject").reason == "too_short"


def test_videos_that_give_no_frames_are_named(tmp_path: Path) -> None:
    truncate(write_clip(tmp_path / "src/cut.avi", 40), 0.5)
    (tmp_path / "src/text.avi").write_text("no video")
    names = ("cut.avi", "text.avi", "none.avi")
    found = convert_rows(tmp_path, *(llava("<video>?", "A.", video=name) for name in names))
    assert [r.reason for r in found if isinstance(r, Rejected)] == [
        "truncated", "unreadable", "missing_video",
    ]  # fmt: skip


# --- pictures ------------------------------------------------------------------------------------


def test_paths_lead_from_the_files_folder_from_images_or_from_the_root_given(
    tmp_path: Path,
) -> None:
    row = llava("<image>?", "A.", image="sub/x.png")
    for place, options in (
        ("src/sub/x.png", {}),
        ("src/images/sub/x.png", {}),
        ("else/sub/x.png", {"image_root": str(tmp_path / "else")}),
    ):
        picture = write_image(tmp_path / place)
        (turn,) = turns_of(tmp_path, row, **options)
        assert turn.images == ("sub/x.png",)
        picture.unlink()
    write_image(tmp_path / "src/images/sub/x.png")
    rejected = rejection_of(tmp_path, row, image_root=str(tmp_path / "else"))
    assert rejected == Rejected("missing_image", "train.jsonl:1: sub/x.png is not there")


def test_absolute_paths_count_inside_the_root_only(tmp_path: Path) -> None:
    outside = write_image(tmp_path / "else/x.png")
    inside = tmp_path / "src/images/a.png"
    (turn,) = turns_of(tmp_path, llava("<image>?", "A.", image=str(inside)))
    assert turn.images == ("images/a.png",)
    (turn,) = turns_of(tmp_path, llava("<image>?", "A.", image=f"file://{inside}"))
    assert turn.images == ("images/a.png",)
    row = llava("<image>?", "A.", image=str(outside))
    assert rejection_of(tmp_path, row).reason == "unsafe_path"
    (turn,) = turns_of(tmp_path, row, image_root=str(tmp_path / "else"))
    assert turn.images == ("x.png",)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../x.png", "unsafe_path"),
        ("images/../../x.png", "unsafe_path"),
        ("/etc/passwd", "unsafe_path"),
        ("file:///etc/passwd", "unsafe_path"),
        ("images\\a.png", "unsafe_path"),
        ("a\nb.png", "unsafe_path"),
        ("a\0b.png", "unsafe_path"),
        ("x" * 5000, "missing_image"),
        ("images", "missing_image"),
        ("https://example.org/a.png", "remote_media"),
        ("s3://bucket/a.png", "remote_media"),
        ("data:image/png;base64,@@", "bad_image"),
        ("data:image/png;base64,AAAA", "bad_image"),
        ("data:image/svg+xml,<svg/>", "unsupported_content"),
        (7, "bad_record"),
        (["a.png"], "bad_record"),
        ({"bytes": None}, "bad_record"),
    ],
)
def test_a_path_that_leads_to_no_picture_is_named(
    tmp_path: Path, path: object, reason: str
) -> None:
    write_image(tmp_path / "x.png")
    rejected = rejection_of(tmp_path, llava("<image>?", "A.", images=[path]))
    assert rejected.reason == reason
    assert rejected.detail.startswith("train.jsonl:1: ")
    assert not (tmp_path / "out").exists()


def test_a_record_with_one_missing_picture_writes_none(tmp_path: Path) -> None:
    row = llava("<image><image>?", "A.", image=["a.png", "gone.png"])
    assert rejection_of(tmp_path, row).reason == "missing_image"
    assert not (tmp_path / "out").exists()


def test_a_damaged_picture_is_rejected(tmp_path: Path) -> None:
    picture = write_image(tmp_path / "src/cut.png")
    truncate(picture, 0.6)
    assert rejection_of(tmp_path, llava("<image>?", "A.", image="cut.png")).reason == "bad_image"


def test_an_embedded_picture_is_written_under_its_content(tmp_path: Path) -> None:
    content = write_image(tmp_path / "x.png", 7).read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    entries = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    (turn,) = turns_of(tmp_path, chat(entries, "A."))
    assert turn.images[0].startswith("embedded/")
    assert turn.images[0].endswith(".png")
    assert (tmp_path / "out/images" / turn.images[0]).read_bytes() == content
    assert rejection_of(tmp_path, chat(entries, "A."), images="link").reason == "embedded_image"


def test_pictures_are_copied_linked_or_encoded_anew(tmp_path: Path) -> None:
    source = write_source(tmp_path / "src", llava("<image>?", "A.", image="a.png"))
    original = source / "images/a.png"
    assert os.stat(original).st_nlink == 1
    linked = run(source, tmp_path / "link", images="link")
    assert os.path.samefile(original, tmp_path / "link/images/a.png")
    assert_valid(linked)
    anew = run(source, tmp_path / "anew", images="reencode", quality=80)
    assert samples_of(anew)[0].images == ("a.png.jpg",)
    with Image.open(tmp_path / "anew/images/a.png.jpg") as picture:
        assert picture.format == "JPEG"


# --- what a sample cannot say --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "bad_json"),
        ("[]", "not_object"),
        ('{"id": 1, "id": 2}', "duplicate_key"),
        ({}, "bad_record"),
        ({"text": "a document"}, "bad_record"),
        ({"conversations": []}, "bad_record"),
        ({"conversations": "x"}, "bad_record"),
        ({"conversations": ["x"]}, "bad_record"),
        ({"conversations": [{"from": "human"}]}, "bad_record"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "bad_record"),
        ({**llava("Q", "A"), **chat("Q", "A")}, "bad_record"),
        (chat({"text": "Q"}, "A"), "bad_record"),
        (chat([3], "A"), "bad_record"),
        (chat([{"type": "text"}], "A"), "bad_record"),
        (llava("<image>", "A", image="a.png", images=["a.png"]), "bad_record"),
        (chat([{"type": "image", "image": "a.png"}], "A", images=["a.png"]), "bad_record"),
        ({"instruction": "Q", "output": "A", "history": 3}, "bad_record"),
        ({"instruction": "Q", "output": "A", "history": [["Q"]]}, "bad_record"),
        ({"messages": [{"role": "assistant", "content": "A"}]}, "bad_roles"),
        ({"messages": [{"role": "user", "content": "Q"}] * 2}, "bad_roles"),
        ({"messages": [{"role": "system", "content": "S"}] * 2}, "bad_roles"),
        ({"messages": [{"role": "system", "content": "S"}]}, "bad_roles"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "unsupported_role"),
        ({"conversations": [{"from": "observation", "value": "x"}]}, "unsupported_role"),
        (chat(" ", "A"), "empty_question"),
        (chat("Q", " "), "empty_answer"),
        (llava("Q"), "no_answer"),
        (llava("Q", "A <image>", image="a.png"), "media_in_answer"),
        (llava("Q <|end|>", "A"), "special_token"),
        (llava("Q", "<|image_1|>"), "special_token"),
        (llava("Find <bbox>", "A", objects={"bbox": []}), "grounding_tags"),
        (llava("Picture 1: <img>a.png</img> What?", "A"), "inline_path"),
        (llava("<audio>Q", "A", audios=["a.wav"]), "unsupported_audio"),
        (llava("<audio>Q", "A"), "unsupported_audio"),
        (chat([{"type": "input_audio"}], "A"), "unsupported_content"),
        (chat("Q", "A", tools=[{"name": "f"}]), "unsupported_tools"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [1]}]},
         "unsupported_tools"),
        ({"messages": [{"role": "user", "content": "Q"},
                       {"role": "assistant", "content": "A", "loss": False}]}, "unlearned_answer"),
        (chat("Q", "A", label=False), "bad_answer"),
        (llava("Q", chosen={"from": "gpt", "value": "A"}), "no_answer"),
    ],
)  # fmt: skip
def test_what_a_sample_cannot_say_is_rejected_by_name(
    tmp_path: Path, row: Any, reason: str
) -> None:
    good = llava("Q", "A")
    found = convert_rows(tmp_path, good, row, good)
    assert [r.reason if isinstance(r, Rejected) else "ok" for r in found] == ["ok", reason, "ok"]
    assert isinstance(found[1], Rejected)
    assert found[1].detail.startswith("train.jsonl:2: ")


TEXTS = st.sampled_from(["", " ", "Q", "<image>", "<video>?", "<image>\nQ", "Q <image><image>"])
PATHS = st.sampled_from(["a.png", "b.png", "gone.png", "../a.png", "", "data:,", "a.avi"])
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | TEXTS | PATHS,
    lambda inside: st.lists(inside, max_size=2) | st.dictionaries(st.just("path"), inside),
    max_leaves=3,
)
ENTRY = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "image_url", "video", 3])},
    optional={"text": TEXTS | JUNK, "image": PATHS | JUNK, "image_url": PATHS | JUNK},
)
ROLE = st.sampled_from(["user", "assistant", "human", "gpt", "system", "tool"]) | JUNK
MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": ROLE, "from": ROLE, "content": TEXTS | st.lists(ENTRY) | JUNK,
                  "value": TEXTS | JUNK},
)  # fmt: skip
RECORD = st.fixed_dictionaries(
    {},
    optional={
        "id": JUNK,
        "messages": st.lists(MESSAGE, max_size=4) | JUNK,
        "conversations": st.lists(MESSAGE, max_size=4) | JUNK,
        "image": PATHS | st.lists(PATHS, max_size=3) | JUNK,
        "images": st.lists(PATHS, max_size=3) | JUNK,
        "videos": st.lists(PATHS | st.lists(PATHS, max_size=2), max_size=2) | JUNK,
        "instruction": TEXTS | JUNK,
        "output": TEXTS | JUNK,
        "history": st.lists(st.lists(TEXTS | JUNK, max_size=3), max_size=2) | JUNK,
        "system": TEXTS | JUNK,
    },
)
GOOD_RECORD = st.builds(
    lambda texts, images, system: llava(*texts, "Q", "A", images=images, system=system),
    st.lists(TEXTS, max_size=4).filter(lambda texts: len(texts) % 2 == 0),
    st.lists(st.sampled_from(["a.png", "b.png"]), max_size=3),
    TEXTS,
)


@settings(max_examples=300, deadline=None)
@given(RECORD | GOOD_RECORD)
def test_any_record_gives_a_valid_sample_or_a_reason(
    tmp_path_factory: pytest.TempPathFactory, row: dict[str, Any]
) -> None:
    tmp_path = tmp_path_factory.mktemp("any")
    (found,) = convert_rows(tmp_path, row)
    if isinstance(found, Rejected):
        assert found.reason.isidentifier()
        assert found.detail.startswith("train.jsonl:1: ")
        return
    for turn in found.conversations:
        marks = [int(match[1]) for match in IMAGE_MARK.finditer(turn.user)]
        assert marks in ([], list(range(1, len(turn.images) + 1)))
        assert turn.images or turn.user.strip()
        assert "<image>" not in turn.user + (turn.assistant or "")
        assert all((tmp_path / "out/images" / name).is_file() for name in turn.images)


# --- files and splits ----------------------------------------------------------------------------


def test_every_file_of_a_folder_is_a_split_and_its_ids_are_places_in_it(tmp_path: Path) -> None:
    rows = [llava("<image>?", "A.", image="a.png", id=7)] * 2
    source = write_source(tmp_path / "src", *rows, name="extra 1.jsonl")
    write_source(source, "", *rows, name="val.jsonl")
    (source / "train.json").write_text(json.dumps(rows))
    (source / "dataset_info.json").write_text('{"mine": {\n"file_name": "train.json"}}')
    (source / "notes.txt").write_text("no records")
    result = run(source, tmp_path / "out", dataset="mine")
    assert result.counts == {"train": 2, "val": 2, "extra_1": 2}
    assert result.files["train"].name == "mine_train.jsonl"
    assert [s.id for s in samples_of(result)] == ["train-0000000000", "train-0000000001"]
    assert [s.id for s in samples_of(result, "val")] == ["val-0000000001", "val-0000000002"]
    assert samples_of(result)[0].metadata == {"id": 7}
    assert samples_of(result)[0].source == "mine"
    assert_valid(result)


def test_one_file_may_be_the_source_and_the_folder_one_further_down(tmp_path: Path) -> None:
    row = llava("<image>?", "A.", image="a.png")
    source = write_source(tmp_path / "src/data", row)
    write_source(source, row, name="val.jsonl")
    assert run(source / "val.jsonl", tmp_path / "one").counts == {"val": 1}
    assert run(tmp_path / "src", tmp_path / "two").counts == {"train": 1, "val": 1}


def test_pictures_may_be_in_the_folder_above_that_of_the_annotations(tmp_path: Path) -> None:
    write_source(tmp_path / "src")
    (tmp_path / "src/train.jsonl").unlink()
    (tmp_path / "src/annotations").mkdir()
    row = llava("<image>?", "A.", image="a.png")
    (tmp_path / "src/annotations/train.jsonl").write_text(json.dumps(row))
    assert run(tmp_path / "src", tmp_path / "out").counts == {"train": 1}


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"notes.txt": "x"}, "no annotations found in .*: expected"),
        ({"train.json": "[]", "train.jsonl": "{}"}, "would both be split 'train'"),
        ({"a/1.jsonl": "{}", "b/1.jsonl": "{}"}, r"holds several data sets \(a, b\)"),
        ({"config.json": '{\n"a": 1}'}, "one object over many lines.*name the file to convert"),
        ({"...jsonl": "{}"}, "no annotations found"),
        ({"é.jsonl": "{}"}, "gives no name for a split"),
    ],
)  # fmt: skip
def test_a_source_of_another_layout_says_what_was_expected(
    tmp_path: Path, files: dict[str, str], problem: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=problem):
        list(ChatJsonl().discover(tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        {"system": "ignore"}, {"images": "move"}, {"dataset": "a/b"}, {"num_frames": 0},
        {"quality": 101}, {"image_root": "nowhere"},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    source = write_source(tmp_path / "src", llava("Q", "A"))
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
        list(ChatJsonl(**options).discover(source))


def test_it_is_found_by_module_and_object() -> None:
    name = "phi3v_data.converters.chat_jsonl:ChatJsonl"
    assert get_converter(name, num_frames=4, short="fewer") == ChatJsonl(4, short="fewer")


@pytest.mark.parametrize("form", ["lines", "array"])
def test_the_output_does_not_depend_on_the_number_of_processes(tmp_path: Path, form: str) -> None:
    rows: list[Any] = []
    for k in range(400):
        rows.append(llava("<image>?", "A. " * 20, image=PICTURES[k % 3]))
        rows.append(llava("<image>?", "B.", image=f"gone{k}.png"))
    source = write_source(tmp_path / "src", *rows)
    if form == "array":
        (source / "train.jsonl").write_text(json.dumps(rows))
    assert len(list(ChatJsonl().discover(source))) > 4
    one = run(source, tmp_path / "one")
    two = run(source, tmp_path / "two", num_workers=2)
    assert one.counts == two.counts == {"train": 400}
    assert one.rejected == two.rejected == {"missing_image": 400}
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("form", ["lines", "array"])
def test_a_large_file_is_read_in_little_memory(tmp_path: Path, form: str) -> None:
    row = json.dumps(llava("Q " * 400, "A. " * 4000))
    with open(tmp_path / "train.json", "w") as file:
        file.write("[" if form == "array" else "")
        file.write((",\n" if form == "array" else "\n").join([row] * 12_000))
        file.write("]" if form == "array" else "")
    assert (tmp_path / "train.json").stat().st_size > 150e6
    code = f"""
        from pathlib import Path
        from phi3v_data.converters.chat_jsonl import ChatJsonl

        converter = ChatJsonl()
        before = peak_mb()
        items = list(converter.discover(Path({str(tmp_path / "train.json")!r})))
        count = sum(1 for item in items[::100] for _ in converter.convert(item, Path("out")))
        print(len(items), count, peak_mb() - before)
    """
    num_items, count, grown_mb = run_measured(code).split()
    assert int(num_items) > 1000
    assert int(count) > 50
    assert float(grown_mb) < 100
