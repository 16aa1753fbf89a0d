import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import phi3v_data
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from phi3v_data.convert import ConversionResult
from phi3v_data.converters.hateful_memes import PROMPT, HatefulMemes
from phi3v_data.jsonl import read_samples
from phi3v_data.schema import Sample

from tests.data.annotations import assert_valid, contents, rejections, write_image, write_lines
from tests.data.peak_memory import run_measured

REAL = Path(__file__).resolve().parents[3] / "shared" / "testdata" / "hateful_memes"
needs_real_lines = pytest.mark.skipif(not REAL.is_dir(), reason="needs the real annotation lines")


def meme(number: int, **changes: object) -> dict[str, Any]:
    row = {"id": number, "img": f"img/{number:05}.png", "label": number % 2, "text": "bows"}
    return {key: value for key, value in (row | changes).items() if value is not ...}


def write_memes(root: Path, count: int = 4) -> Path:
    """`data/train.jsonl` with ids 1 … count, and their pictures."""
    write_lines(root / "data/train.jsonl", *(meme(number) for number in range(1, count + 1)))
    for number in range(1, count + 1):
        write_image(root / f"data/img/{number:05}.png", number)
    return root


def run(source: Path, out_dir: Path, **options: Any) -> ConversionResult:
    workers = options.pop("num_workers", 0)
    return phi3v_data.convert(HatefulMemes(**options), source, out_dir, num_workers=workers)


def samples_of(result: ConversionResult, split: str = "train") -> list[Sample]:
    return list(read_samples(result.files[split], allow_missing_answer=True))


def test_a_meme_becomes_a_yes_or_no_question(tmp_path: Path) -> None:
    result = run(write_memes(tmp_path / "src"), tmp_path / "out")
    assert result.counts == {"train": 4}
    turn = {"images": ["img/00001.png"], "user": PROMPT, "assistant": "Yes."}
    expected = {"id": "train-00001", "source": "hateful_memes", "conversations": [turn]}
    assert json.loads(samples_of(result)[0].to_json()) == expected
    assert [s.conversations[0].assistant for s in samples_of(result)] == [
        "Yes.", "No.", "Yes.", "No.",
    ]  # fmt: skip
    source = (tmp_path / "src/data/img/00001.png").read_bytes()
    assert (tmp_path / "out/images/img/00001.png").read_bytes() == source
    assert_valid(result)


def test_include_text_puts_the_text_before_the_question(tmp_path: Path) -> None:
    root = write_memes(tmp_path / "src", 1)
    lines = (meme(1, text='say "bows"'), meme(2, img="img/00001.png", text=""))
    write_lines(root / "data/train.jsonl", *lines)
    first, second = samples_of(run(root, tmp_path / "out", include_text=True, prompt="Hateful?"))
    assert first.conversations[0].user == 'The text on the meme reads: "say "bows""\nHateful?'
    assert second.conversations[0].user == "Hateful?"


def test_every_split_file_is_a_split_and_other_files_are_none(tmp_path: Path) -> None:
    write_image(tmp_path / "src/img/00001.png")
    names = ["train", "dev_seen", "dev_unseen", "test_seen", "test_unseen", "dev", "test"]
    for name in names:
        write_lines(tmp_path / f"src/{name}.jsonl", meme(1))
    write_lines(tmp_path / "src/notes.jsonl", meme(1))
    result = run(tmp_path / "src", tmp_path / "out")
    assert sorted(result.files) == sorted(names)
    assert next(iter(result.files)) == "train"
    assert samples_of(result, "dev_seen")[0].id == "dev_seen-00001"
    report = phi3v_data.validate(list(result.files.values()))
    assert not [d for d in report.diagnostics if d.code == "D101"], "ids differ between splits"


def test_one_file_may_be_the_source(tmp_path: Path) -> None:
    root = write_memes(tmp_path / "src")
    write_lines(root / "data/dev.jsonl", meme(1))
    assert run(root / "data/train.jsonl", tmp_path / "out").counts == {"train": 4}


@pytest.mark.parametrize("images", ["data/img", "img", "images/img", "images"])
@pytest.mark.parametrize("inside", ["", "hateful_memes/"])
def test_the_pictures_may_be_beside_or_above_the_annotations(
    tmp_path: Path, images: str, inside: str
) -> None:
    root = tmp_path / "src"
    write_lines(root / inside / "data/train.jsonl", meme(1))
    write_image(root / inside / images / "00001.png")
    assert samples_of(run(root, tmp_path / "out"))[0].images == ("img/00001.png",)
    if not inside:
        assert run(root / "data", tmp_path / "out2").counts == {"train": 1}


@pytest.mark.parametrize("identity", [8291, "8291", "08291"], ids=repr)
@pytest.mark.parametrize("img", ["img/08291.png", "img/8291.png", "08291.png", ...])
def test_ids_and_names_with_and_without_zeros_mean_the_same_meme(
    tmp_path: Path, identity: object, img: object
) -> None:
    write_lines(tmp_path / "src/train.jsonl", meme(8291, id=identity, img=img))
    write_image(tmp_path / "src/img/08291.png")
    (sample,) = samples_of(run(tmp_path / "src", tmp_path / "out"))
    assert sample.id == "train-08291"
    assert Path(sample.images[0]).name == "08291.png"


def test_a_test_file_without_labels_gives_samples_without_answers(tmp_path: Path) -> None:
    write_image(tmp_path / "src/img/00001.png")
    write_lines(tmp_path / "src/test_seen.jsonl", meme(1, label=...), meme(2, img="img/00001.png"))
    write_lines(tmp_path / "src/train.jsonl", meme(1), meme(2, img="img/00001.png", label=None))
    result = run(tmp_path / "src", tmp_path / "out")
    first, second = samples_of(result, "test_seen")
    assert first.conversations[0].assistant is None
    assert second.conversations[0].assistant == "No."
    assert result.counts == {"train": 1, "test_seen": 2}
    detail = "train.jsonl:2: train needs labels; only test files may lack them"
    assert rejections(result) == [("no_label", detail)]
    assert_valid(result, allow_missing_answer=True)


@pytest.mark.parametrize(
    ("label", "answer"),
    [(0, "No."), (1, "Yes."), ("1", "Yes."), (1.0, "Yes."), (False, "No."), (2, None), (-1, None)],
    ids=repr,
)
def test_labels_are_0_or_1_however_written(tmp_path: Path, label: object, answer: str) -> None:
    write_memes(tmp_path / "src", 2)
    write_lines(tmp_path / "src/data/train.jsonl", meme(1, label=label), meme(2))
    result = run(tmp_path / "src", tmp_path / "out")
    assert result.rejected == ({} if answer else {"bad_label": 1})
    if answer:
        assert samples_of(result)[0].conversations[0].assistant == answer


BAD_LINES: list[tuple[str, bytes | dict[str, Any]]] = [
    ("bad_json", b'{"id": 9, "img"'),
    ("bad_json", b"[" * 100_000),
    ("not_object", b'"text"'),
    ("bad_utf8", b'{"id": 9, "img": "img/00001.png", "label": 0, "text": "caf\xe9"}'),
    ("bad_unicode", b'{"id": 9, "img": "img/00001.png", "label": 0, "text": "\\ud800"}'),
    ("duplicate_key", b'{"id": 9, "id": 10, "img": "img/00001.png", "label": 0, "text": ""}'),
    ("record_too_long", b'{"id": 9, "text": "' + b"x" * 17_000_000 + b'"}'),
    ("duplicate_id", meme(1)),
    ("duplicate_id", meme(1, id="00001")),
    ("bad_id", meme(9, id=None)),
    ("bad_id", meme(9, id=[1])),
    ("bad_row", meme(9, img=7)),
    ("missing_image", meme(9)),
    ("unsafe_path", meme(9, img="../secret.png")),
    ("unsafe_path", meme(9, img="img/../../secret.png")),
    ("unsafe_path", meme(9, img="/etc/passwd")),
    ("unsafe_path", meme(9, img="C:/x.png")),
    ("unsafe_path", meme(9, img="img\\x.png")),
    ("unsafe_path", meme(9, img="img/a\nb.png")),
    ("unsafe_path", meme(9, img="img/\0.png")),
    ("unsafe_path", meme(9, img="")),
    ("missing_image", meme(9, img="img/" + "x" * 5000)),
    ("missing_image", meme(9, img="img/folder")),
    ("bad_image", meme(9, img="img/empty.png")),
    ("bad_image", meme(9, img="img/half.png")),
    ("bad_image", meme(9, img="img/page.png")),
    ("special_token", meme(9, img="img/00001.png", text="so <|end|> it")),
]


@pytest.mark.parametrize(
    ("reason", "line"),
    [pytest.param(reason, line, id=f"{k}-{reason}") for k, (reason, line) in enumerate(BAD_LINES)],
)
def test_a_bad_line_is_named_and_costs_no_other(
    tmp_path: Path, reason: str, line: bytes | dict[str, Any]
) -> None:
    root = write_memes(tmp_path / "src", 2)
    write_lines(root / "data/train.jsonl", meme(1), line, meme(2))
    write_image(root / "secret.png")
    (root / "data/img/folder").mkdir()
    (root / "data/img/empty.png").touch()
    (root / "data/img/page.png").write_text("<html>410 Gone</html>")
    whole = write_image(root / "data/img/00001.png", 1).read_bytes()
    (root / "data/img/half.png").write_bytes(whole[: len(whole) - 30])
    result = run(root, tmp_path / "out", include_text=True)
    assert [sample.id for sample in samples_of(result)] == ["train-00001", "train-00002"]
    ((found, detail),) = rejections(result)
    assert found == reason
    assert detail.startswith("train.jsonl:2: ")
    assert len(detail) < 300
    assert_valid(result)
    assert sorted(contents(tmp_path / "out/images")) == ["img/00001.png", "img/00002.png"]


def test_a_byte_order_mark_blank_lines_and_crlf_take_nothing_away(tmp_path: Path) -> None:
    root = write_memes(tmp_path / "src", 2)
    rows = [json.dumps(meme(number)).encode() for number in (1, 2)]
    (root / "data/train.jsonl").write_bytes(b"\xef\xbb\xbf" + rows[0] + b"\r\n\r\n \n" + rows[1])
    result = run(root, tmp_path / "out")
    assert result.counts == {"train": 2}
    assert not result.rejected


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            b"id,img,label\n1,img/1.png,0\n",
            "train.jsonl is no JSON: expected one object a line",
        ),
        (json.dumps(meme(1)).encode("utf-16"), "data/train.jsonl is UTF-16; expected UTF-8"),
    ],
)
def test_a_file_of_another_kind_says_so_once(tmp_path: Path, content: bytes, problem: str) -> None:
    root = write_memes(tmp_path / "src")
    (root / "data/train.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=problem):
        run(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pictures_still_in_an_archive_are_pointed_out(tmp_path: Path) -> None:
    write_lines(tmp_path / "src/train.jsonl", meme(1))
    (tmp_path / "src/img.tar.gz").touch()
    with pytest.raises(ValueError, match=r"unpack it there: tar -xf img\.tar\.gz"):
        run(tmp_path / "src", tmp_path / "out")


def test_a_folder_without_annotations_says_what_was_expected(tmp_path: Path) -> None:
    write_lines(tmp_path / "src/memes.jsonl", meme(1))
    with pytest.raises(ValueError, match=r"no annotations found in .*: expected data/\{train"):
        run(tmp_path / "src", tmp_path / "out")
    for name in "ab":
        write_memes(tmp_path / "src" / name)
    with pytest.raises(ValueError, match=r"holds several data sets \(a, b\)"):
        run(tmp_path / "src", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": "move"}, "images: expected copy, link or reencode, got 'move'"),
        ({"quality": 0}, "quality: expected 1 to 100, got 0"),
        ({"prompt": " "}, "prompt: expected a question"),
    ],
)
def test_a_wrong_option_says_what_was_expected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HatefulMemes(**options)


def test_linked_pictures_share_their_bytes_with_the_source(tmp_path: Path) -> None:
    root = write_memes(tmp_path / "src", 2)
    result = run(root, tmp_path / "out", images="link")
    source, output = root / "data/img/00001.png", tmp_path / "out/images/img/00001.png"
    assert source.samefile(output)
    assert_valid(result)
    run(root, tmp_path / "copied")
    assert contents(tmp_path / "out/images") == contents(tmp_path / "copied/images")


def test_reencoded_pictures_are_jpegs_and_are_called_so(tmp_path: Path) -> None:
    result = run(write_memes(tmp_path / "src", 1), tmp_path / "out", images="reencode", quality=50)
    (name,) = samples_of(result)[0].images
    assert name == "img/00001.jpg"
    assert phi3v_data.probe_image(tmp_path / "out/images" / name).format == "JPEG"
    assert_valid(result)
    assert phi3v_data.validate([result.files["train"]]).diagnostics == ()


def write_many(root: Path, count: int = 1500) -> Path:
    """Enough lines for many groups, two splits that share their pictures, and repeated ids."""
    for number in range(20):
        write_image(root / f"img/{number:05}.png", number)
    rows = [meme(number, img=f"img/{number % 20:05}.png") for number in range(count)]
    write_lines(root / "train.jsonl", *rows, meme(3), meme(count - 1))
    write_lines(root / "dev_seen.jsonl", *rows[:500])
    return root


def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    root = write_many(tmp_path / "src")
    one = run(root, tmp_path / "one")
    assert one.num_items > 6
    assert one.counts == {"train": 1500, "dev_seen": 500}
    assert [d.partition(":")[2] for _, d in rejections(one)] == [
        "1501: an earlier one has the same id",
        "1502: an earlier one has the same id",
    ]
    run(root, tmp_path / "two", num_workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_ids_repeated_in_far_groups_are_found_and_no_others(tmp_path: Path) -> None:
    numbers = [(k * 7919) % 5000 for k in range(8000)]  # 5000 different, then 3000 once more
    write_lines(tmp_path / "src/train.jsonl", *(meme(number) for number in numbers))
    bits = 0
    for item in HatefulMemes().discover(tmp_path / "src"):
        group = item.payload.records
        bits |= group.repeated << group.first_number
    assert bits == ((1 << 3000) - 1) << 5000


def test_listing_is_lazy_and_a_line_without_end_is_not_held(tmp_path: Path) -> None:
    import tracemalloc

    root = write_memes(tmp_path / "src", 1)
    with open(root / "data/train.jsonl", "ab") as file:
        for _ in range(50):
            file.write(b" " * 1_000_000)
        file.write(b'"\n')
    tracemalloc.start()
    result = run(root, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.counts == {"train": 1}
    assert result.rejected == {"record_too_long": 1}
    assert peak < 12_000_000


@pytest.mark.slow
@pytest.mark.long
def test_a_file_of_1_gb_is_listed_in_less_than_300_mb(tmp_path: Path) -> None:
    with open(tmp_path / "train.jsonl", "wb") as file:
        number = 0
        while number % 10_000 or file.tell() < 1_000_000_000:
            file.write(json.dumps(meme(number) | {"text": "word " * 80}).encode() + b"\n")
            number += 1
    script = """
        import sys
        from pathlib import Path
        from phi3v_data.converters.hateful_memes import HatefulMemes
        converter, source = HatefulMemes(), Path(sys.argv[1])
        items = list(converter.discover(source))
        num_rejected = sum(1 for _ in converter.convert(items[1], source / "out"))
        print(len(items), num_rejected, int(peak_mb()))
    """
    num_items, num_rejected, peak_mb = map(int, run_measured(script, tmp_path).split())
    assert 1000 < num_items < 2100
    assert num_rejected > 500
    assert peak_mb < 300


# --- the Cauldron's form -------------------------------------------------------------------------


def write_cauldron(path: Path, rows: list[dict[str, Any]], row_group_size: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    text = pa.struct([(key, pa.string()) for key in ("user", "assistant", "source")])
    schema = pa.schema([("images", pa.list_(image)), ("texts", pa.list_(text))])
    table = pa.Table.from_pylist(rows, schema=schema)  # pyright: ignore[reportUnknownMemberType]
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def cauldron_row(picture: bytes | None, *texts: tuple[str, str | None]) -> dict[str, Any]:
    return {
        "images": [{"bytes": picture, "path": None}],
        "texts": [{"user": u, "assistant": a, "source": "hateful_memes"} for u, a in texts],
    }


@pytest.fixture
def picture(tmp_path: Path) -> Callable[[int], bytes]:
    return lambda color: write_image(tmp_path / f"pictures/{color}.png", color).read_bytes()


def test_cauldron_rows_are_taken_as_they_are(
    tmp_path: Path, picture: Callable[[int], bytes]
) -> None:
    rows = [cauldron_row(picture(k), (f"Is it {k}?\nAnswer yes or no.", "Yes.")) for k in range(7)]
    write_cauldron(tmp_path / "src/train-00000-of-00001-0123456789abcdef.parquet", rows)
    result = run(tmp_path / "src", tmp_path / "out")
    assert result.num_items == 3
    samples = samples_of(result)
    assert [sample.id for sample in samples] == [f"train-{k:07d}" for k in range(7)]
    assert samples[6].source == "hateful_memes"
    (turn,) = samples[6].conversations
    assert (turn.user, turn.assistant) == ("Is it 6?\nAnswer yes or no.", "Yes.")
    assert (tmp_path / "out/images" / turn.images[0]).read_bytes() == picture(6)
    assert_valid(result)


def test_a_bad_cauldron_row_is_named_and_leaves_a_gap(
    tmp_path: Path, picture: Callable[[int], bytes]
) -> None:
    good = cauldron_row(picture(1), ("Is it?", "No."))
    bad = [
        ("bad_image", cauldron_row(picture(1)[:45], ("Is it?", "No."))),
        ("bad_image", cauldron_row(b"", ("Is it?", "No."))),
        ("missing_image", cauldron_row(None, ("Is it?", "No."))),
        ("bad_row", {"images": [], "texts": good["texts"]}),
        ("no_text", cauldron_row(picture(1))),
        ("bad_row", cauldron_row(picture(1), ("Is it?", None))),
        ("special_token", cauldron_row(picture(1), ("Is it <|end|>?", "No."))),
    ]
    write_cauldron(tmp_path / "src/train.parquet", [good, *(row for _, row in bad), good])
    result = run(tmp_path / "src", tmp_path / "out")
    assert [sample.id for sample in samples_of(result)] == ["train-0000000", "train-0000008"]
    found = rejections(result)
    assert [reason for reason, _ in found] == [reason for reason, _ in bad]
    assert [detail.partition(": ")[0].rpartition(" ")[2] for _, detail in found] == list("1234567")
    assert_valid(result)


def test_parquet_of_another_kind_is_refused_by_its_columns(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    pq.write_table(pa.table({"image": [b""], "label": [0]}), tmp_path / "src/train.parquet")
    with pytest.raises(ValueError, match="expected columns images and texts, got"):
        run(tmp_path / "src", tmp_path / "out")


def test_pictures_inside_parquet_cannot_be_linked(
    tmp_path: Path, picture: Callable[[int], bytes]
) -> None:
    write_cauldron(tmp_path / "src/train.parquet", [cauldron_row(picture(1), ("Is it?", "No."))])
    with pytest.raises(ValueError, match="images=link: pictures inside a Parquet file"):
        run(tmp_path / "src", tmp_path / "out", images="link")
    result = run(tmp_path / "src", tmp_path / "out", images="reencode")
    assert samples_of(result)[0].images[0].endswith(".jpg")


# --- real lines ----------------------------------------------------------------------------------


def copy_real(folder: str, target: Path) -> Path:
    """The real lines with stand-ins for the pictures, which may not be redistributed."""
    for path in (REAL / folder).glob("*.jsonl"):
        lines = path.read_bytes().splitlines()
        write_lines(target / path.name, *lines)
        for number, line in enumerate(lines):
            write_image(target / json.loads(line)["img"], number)
    return target


@needs_real_lines
def test_the_real_lines_convert_whole(tmp_path: Path) -> None:
    result = run(copy_real("data", tmp_path / "src"), tmp_path / "out")
    assert not result.rejected
    assert result.counts["dev_seen"] == 22
    assert result.counts["dev_unseen"] == 25
    assert result.counts["train"] == 17
    assert all(s.conversations[0].assistant is None for s in samples_of(result, "test_nolabel"))
    assert_valid(result, allow_missing_answer=True)
    # Ids as numbers and as text with zeros are the same samples.
    strings, numbers = (samples_of(result, s) for s in ("train", "train_official_layout"))
    assert [s.conversations for s in strings] == [s.conversations for s in numbers]
    assert [s.id.rpartition("-")[2] for s in strings] == [s.id.rpartition("-")[2] for s in numbers]


@needs_real_lines
def test_the_real_lines_with_escaped_slashes_convert_whole(tmp_path: Path) -> None:
    result = run(copy_real("variant_int_ids", tmp_path / "src"), tmp_path / "out")
    assert not result.rejected
    assert result.counts == {"dev_seen": 10, "dev_unseen": 12}
    assert_valid(result)
