import base64
import hashlib
import io
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from phi3v_data import Sample, Turn, write_samples
from phi3v_data.cli import main
from phi3v_data.preview import PreviewResult, write_preview
from PIL import Image

ATTACK = "</script><script>window.pwned = 1</script><img src=x onerror=window.pwned=1>"


def sample(id: str, *images: str, user: str = "What?", answer: str | None = "a") -> Sample:
    turns = (Turn(images=images, user=user, assistant=answer),)
    return Sample(id=id, source="toy", conversations=turns)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(8):
        Image.new("RGB", (40, 30), (number * 30, 0, 0)).save(tmp_path / f"images/{number}.jpg")
    write_samples(tmp_path / "train.jsonl", [sample("1", "0.jpg"), sample("2", "0.jpg", "1.jpg")])
    write_samples(tmp_path / "val.jsonl", [sample("3", "2.jpg", answer=" "), sample("4")])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def preview(*files: str, **options: Any) -> tuple[PreviewResult, dict[str, Any]]:
    """The result, and the data in the page."""
    result = write_preview(files, "p.html", **options)
    return result, data_of(Path("p.html"))


def data_of(page: Path) -> dict[str, Any]:
    html = page.read_text()
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert block is not None
    return json.loads(block[1])


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["preview", *arguments])


def codes(data: dict[str, Any]) -> list[list[str]]:
    """The codes found in each sample."""
    return [[finding[0] for finding in s.get("d", ())] for s in data["samples"]]


def test_every_sample_is_there_with_its_texts_images_and_findings():
    result, data = preview("train.jsonl", "val.jsonl")
    first, second, third, _ = data["samples"]

    assert (result.num_samples, result.num_lines, result.num_images) == (4, 4, 3)
    assert [s["i"] for s in data["samples"]] == ["1", "2", "3", "4"]
    assert [(s["f"], s["l"]) for s in data["samples"]] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert data["texts"][first["t"][0]["u"]] == "What?"
    assert [data["images"][i] for i in second["t"][0]["i"]] == [
        ["0.jpg", 40, 30, ""],
        ["1.jpg", 40, 30, ""],
    ]
    assert "T101" in codes(data)[2]
    assert third["d"][0][4] == "/conversations/0/assistant"
    assert result.counts["T101"] == 1
    assert data["rules"]["T101"]["severity"] == "error"
    assert result.num_bytes == Path("p.html").stat().st_size


def test_an_image_of_several_samples_and_a_prompt_that_repeats_stand_once():
    _, data = preview("train.jsonl")
    assert len(data["images"]) == len(data["thumbnails"]) == 2
    assert data["texts"].count("What?") == 1


def test_thumbnails_are_small_pictures_of_the_images():
    _, data = preview("train.jsonl")
    picture = Image.open(io.BytesIO(base64.b64decode(data["thumbnails"][1])))

    assert picture.size == (40, 30)
    red, green, _ = np.asarray(picture.convert("RGB")).reshape(-1, 3).mean(axis=0)
    assert (red, green) == (pytest.approx(30, abs=6), pytest.approx(0, abs=6))


def test_findings_across_samples_stand_at_their_samples():
    write_samples("train.jsonl", [sample("1", "0.jpg"), sample("1", "1.jpg", user="More?")])
    write_samples("val.jsonl", [sample("3", "0.jpg")])
    result, data = preview("train.jsonl", "val.jsonl")

    assert "D101" in codes(data)[1]
    assert "D103" in codes(data)[2]  # the image is in both splits
    assert result.counts["D103"] == 1


def test_the_page_needs_no_other_file_and_no_network():
    preview("train.jsonl", "val.jsonl")
    html = Path("p.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)

    assert policy is not None
    assert "default-src 'none'; img-src data:;" in policy[1]
    assert "unsafe" not in policy[1]
    assert not re.search(r"<(?:link|iframe|object|embed|base)\b|\ssrc=|@import|url\(", html)
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", html)


def test_the_policy_allows_the_script_and_the_style_of_the_page_and_no_other():
    preview("train.jsonl")
    html = Path("p.html").read_text()
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert re.findall(rf"{tag}-src ([^;]*);", html)[0] == f"'sha256-{digest}'"


def test_nothing_in_the_data_can_end_the_block_it_stands_in(root: Path):
    name = f"images/{ATTACK.replace('/', '')}.jpg"
    Image.new("RGB", (9, 9)).save(root / name)
    hostile = sample(ATTACK, name[7:], user=ATTACK + "\u2028\u2029", answer=ATTACK + "<!--")
    write_samples("<b>.jsonl", [hostile.model_copy(update={"metadata": {ATTACK: ATTACK}})])
    _, data = preview("<b>.jsonl")
    html = Path("p.html").read_text()

    assert data["samples"][0]["i"] == ATTACK
    assert data["samples"][0]["m"] == [[ATTACK, ATTACK]]
    assert data["files"][0]["name"] == "<b>.jsonl"
    assert html.count("<script") == 2
    assert html.count("onerror=") == html.count("\\u003cimg src=x onerror=")
    assert "<!--" not in html
    assert "\u2028" not in html


def test_half_a_surrogate_pair_is_replaced(root: Path):
    Path("train.jsonl").write_text(
        '{"id": "\\ud800x", "source": "s", "conversations": [{"user": "\\udfff", '
        '"assistant": "\\ud83d\\ude00"}]}\n'
    )
    _, data = preview("train.jsonl")

    assert data["samples"][0]["i"] == "\ufffdx"
    assert "\N{GRINNING FACE}" in data["texts"]


def test_the_same_input_gives_the_same_bytes():
    write_preview(["train.jsonl", "val.jsonl"], "one.html", num_workers=1)
    write_preview(["train.jsonl", "val.jsonl"], "two.html", num_workers=4)
    assert Path("one.html").read_bytes() == Path("two.html").read_bytes()


def test_a_line_that_is_no_sample_is_shown_as_it_stands():
    broken = '{"id": "x", "source": "s", "conversations": [{"user": "no end}]}'
    lines = [broken, "[1]", '{"id": 7, "conversations": [3, {"user": {}, "images": "a"}]}']
    Path("train.jsonl").write_text("\n".join(lines) + "\n")
    _, data = preview("train.jsonl")
    first, second, third = data["samples"]

    assert "P101" in codes(data)[0]
    assert first["r"][0] == broken
    assert first["r"][1] >= 0
    assert (first["t"], second["t"]) == ([], [])
    assert second["r"][0] == "[1]"
    assert (third["i"], len(third["t"])) == ("7", 1)


def test_of_a_long_line_the_part_around_the_spot_is_shown():
    line = '{"id": "' + "x" * 50_000 + '", "source" 1, "conversations": []}' + " " * 9_000 + "}"
    Path("train.jsonl").write_text(line + "\n")
    _, data = preview("train.jsonl")
    text, spot = data["samples"][0]["r"]

    assert len(text) < 5_000
    assert text[spot] == "1"
    assert text.startswith("…")
    assert text.endswith("…")


def test_images_outside_the_root_are_not_on_the_page(root: Path):
    secret = Image.new("RGB", (40, 30), "white")
    secret.save(root / "secret.png")
    (root / "images" / "link.png").symlink_to(root / "secret.png")
    write_samples("train.jsonl", [sample("1", "../secret.png", "link.png", "gone.png", "0.jpg")])
    _, data = preview("train.jsonl")

    assert [bool(thumbnail) for thumbnail in data["thumbnails"]] == [False, False, False, True]
    assert [image[3] for image in data["images"]][:3] == [
        "leaves the image root by ..",
        "is a link that leads out of the image root",
        "does not exist",
    ]


def test_an_image_that_does_not_decode_says_why(root: Path):
    (root / "images" / "text.jpg").write_text("no image")
    write_samples("train.jsonl", [sample("1", "text.jpg")])
    _, data = preview("train.jsonl")

    assert data["thumbnails"] == [""]
    assert "not an image" in data["images"][0][3]


def test_of_many_samples_an_even_part_and_faulty_ones_are_shown():
    samples = [sample(str(i), answer=" " if i % 50 == 7 else "a") for i in range(400)]
    write_samples("train.jsonl", samples)
    result, data = preview("train.jsonl", max_samples=40, ignore=["D"])
    faulty = [int(s["i"]) for s in data["samples"] if "d" in s]
    clean = [int(s["i"]) for s in data["samples"] if "d" not in s]

    assert (result.num_samples, result.num_lines, result.counts) == (38, 400, {"T101": 8})
    assert faulty == list(range(7, 400, 50))
    assert len(clean) == 30
    assert max(b - a for a, b in pairwise(clean)) <= 14
    assert data["notes"] == [
        "38 of 400 samples are shown, evenly spread; 8 of 8 with findings",
    ]


def noisy_images(root: Path, number: int) -> list[str]:
    names = [f"noise{i}.png" for i in range(number)]
    generator = np.random.default_rng(0)
    for name in names:
        pixels = generator.integers(0, 256, (120, 160, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / name)
    return names


@pytest.mark.parametrize("max_mb", [0.2, 0.3, 0.5])
def test_the_page_stays_below_its_limit_and_says_what_it_left_out(root: Path, max_mb: float):
    names = noisy_images(root, 48)
    write_samples("train.jsonl", [sample(str(i), *names[i : i + 8]) for i in range(0, 48, 8)])
    result, data = preview("train.jsonl", max_mb=max_mb)

    assert result.num_bytes <= max_mb * 1e6
    assert result.num_bytes == Path("p.html").stat().st_size
    assert result.num_images > 0
    assert data["notes"] == list(result.notes)
    assert "images are no larger than" in result.notes[-1]


def test_more_room_gives_more_of_the_images(root: Path):
    names = noisy_images(root, 16)
    write_samples("train.jsonl", [sample(str(i), *names[i : i + 8]) for i in range(0, 16, 8)])
    sizes = [preview("train.jsonl", max_mb=max_mb)[0].num_bytes for max_mb in (0.2, 0.3, 50)]

    assert sizes == sorted(sizes)
    assert preview("train.jsonl")[0].notes == ()


def test_long_texts_are_cut_and_counted():
    write_samples("train.jsonl", [sample("1", user="x" * 10_000), sample("2")])
    result, data = preview("train.jsonl", ignore=["T"])
    text = data["texts"][data["samples"][0]["t"][0]["u"]]

    assert text == "x" * 4000 + " … [6,000 more characters]"
    assert data["samples"][0]["t"][0]["n"] == 10_000
    assert result.notes == ("1 long texts are cut",)


def test_where_texts_alone_are_too_much_fewer_samples_are_shown():
    texts = [f"{i} " + "x" * 500 for i in range(1000)]
    write_samples("train.jsonl", [sample(t[:90], user=t, answer=t[::-1]) for t in texts])
    result, _ = preview("train.jsonl", max_mb=0.3, ignore=["D", "T"])

    assert result.num_bytes <= 300_000
    assert 0 < result.num_samples < 1000
    assert f"texts are long: only {result.num_samples} samples fit" in result.notes


def test_an_interruption_leaves_the_old_page_and_no_half_file(root: Path):
    Path("p.html").write_text("old")

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "drawing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_preview(["train.jsonl"], "p.html", progress=interrupt)
    assert Path("p.html").read_text() == "old"
    assert not [path for path in root.iterdir() if path.name.startswith(".p.html")]


def test_wrong_arguments_say_what_is_expected():
    with pytest.raises(ValueError, match="max_samples: expected 1 or more, got 0"):
        write_preview(["train.jsonl"], "p.html", max_samples=0)
    with pytest.raises(ValueError, match=r"max_mb: expected 0\.\d\d or more, got 0.01"):
        write_preview(["train.jsonl"], "p.html", max_mb=0.01)
    with pytest.raises(ValueError, match=r"gone\.jsonl"):
        write_preview(["gone.jsonl"], "p.html")
    with pytest.raises(ValueError, match="X9"):
        write_preview(["train.jsonl"], "p.html", select=["X9"])


def test_the_command_exits_0_whatever_was_found_and_tells_what_it_wrote():
    result = run("train.jsonl", "val.jsonl", "--out", "p.html")

    assert result.exit_code == 0
    assert re.match(r"4 samples, 3 images, \d findings?: p\.html \(0\.1 MB\)\n", result.output)
    assert run("train.jsonl", "--out", "q.html", "--max_samples", "1").output.endswith(
        "not all is there: 1 of 2 samples are shown, evenly spread; 0 of 0 with findings\n"
    )


def test_wrong_usage_exits_2_and_a_folder_that_cannot_be_made_1(root: Path):
    assert run("gone.jsonl", "--out", "p.html").exit_code == 2
    assert run("train.jsonl", "--out", "p.html", "--select", "X9").exit_code == 2
    assert run("train.jsonl", "--out", "train.jsonl/p.html").exit_code == 1


def test_the_commands_of_the_page_about_looking_run(root: Path):
    page = Path(__file__).resolve().parents[2] / "docs" / "looking-at-data.md"
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line]

    assert {line.split()[1] for line in lines} == {"stats", "preview"}
    for line in lines:
        result = CliRunner().invoke(main, line.split()[1:])
        assert result.exit_code == 0, result.output
