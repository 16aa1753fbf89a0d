"""The page of `phi3v-data preview` in a browser: headless Chromium, see `chromium.py`."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from phi3v_data import Sample, Turn, write_samples
from phi3v_data.preview import write_preview
from PIL import Image

from .chromium import PROGRAM, Chromium, keep_screenshot, trouble

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(PROGRAM is None, reason="needs Chromium: apt-get install chromium"),
]

ATTACK = (
    "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'>"
    "<svg onload='window.pwned = 1'><a href='javascript:window.pwned = 1'>x</a>"
    "<style>body { display: none }</style><iframe src='https://example.com/'></iframe>"
)


def sample(id: str, *images: str, user: str = "What is it?", answer: str = "a cat") -> Sample:
    turns = (Turn(images=images, user=user, assistant=answer),)
    return Sample(id=id, source="toy", conversations=turns)


def photo(file: Path, seed: int) -> None:
    """A smooth picture, as large when encoded as a photo is."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((320, 240), Image.Resampling.BICUBIC).save(file, quality=80)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with clips, pairs, single images, several turns, faulty samples and an attack."""
    root = tmp_path_factory.mktemp("preview")
    images = root / "images"
    for clip in range(4):
        for frame in range(8):
            photo(images / f"clip{clip}.{frame}.jpg", clip * 10 + frame)
    photo(images / "alone.jpg", 99)
    photo(images / f"{ATTACK.replace('/', '_')[:80]}.jpg", 98)
    clips = [
        sample(f"clip-{i}", *(f"clip{i}.{k}.jpg" for k in range(8)), answer=answer)
        for i, answer in enumerate(["Archery", "Biking"] * 2)
    ]
    first = Turn(images=("alone.jpg", "clip0.0.jpg"), user="First?", assistant="A bicycle.")
    answers = ("A bow.", "bow")
    second = Turn(images=("clip1.0.jpg",), user="2nd?", assistant=answers[0], answers=answers)
    chat = Sample(id="chat", source="toy", conversations=(first, second), metadata={"page": 3})
    write_samples(root / "train.jsonl", [*clips, chat])
    attack = sample(
        ATTACK, f"{ATTACK.replace('/', '_')[:80]}.jpg", "gone.jpg", user=ATTACK, answer=ATTACK
    )
    attack = attack.model_copy(update={"source": ATTACK, "metadata": {ATTACK: ATTACK}})
    bad = [
        sample("silent", "alone.jpg", answer=" "),
        sample("token", user="stop <|end|> here"),
        attack,
    ]
    write_samples(root / "val.jsonl", bad)
    with open(root / "val.jsonl", "a") as file:
        file.write('{"id": "broken", "source": <img src=x onerror=window.pwned=1>}\n')
    write_preview([root / "train.jsonl", root / "val.jsonl"], root / "preview.html")
    return root / "preview.html"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chromium]:
    with Chromium(tmp_path) as chromium:
        yield chromium


def ids(browser: Chromium) -> list[str]:
    """The ids on the cards that can be seen."""
    return browser.evaluate(
        "[...document.querySelectorAll('.card')].map((c) => c.querySelector('.id').textContent)"
    )


def click(browser: Chromium, selector: str) -> None:
    """Click in the middle of an element, as a person does."""
    box = browser.evaluate(
        f"(() => {{ const e = document.querySelector({selector!r});"
        " e.scrollIntoView({ block: 'nearest' });"
        " const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
    )
    for kind in ("mousePressed", "mouseReleased"):
        event = {"type": kind, "x": box[0], "y": box[1], "button": "left", "clickCount": 1}
        browser.call("Input.dispatchMouseEvent", event)


def keep(browser: Chromium, name: str, tmp_path: Path) -> Path:
    """Take a screenshot; `PREVIEW_SCREENSHOTS` is a folder to keep it in."""
    return keep_screenshot(browser, tmp_path / name, "PREVIEW_SCREENSHOTS")


def test_the_gallery_shows_all_samples_and_their_pictures(
    browser: Chromium, page: Path, tmp_path: Path
):
    browser.open(page)
    assert len(ids(browser)) == 9
    loaded = "[...document.images].every((i) => i.complete && i.naturalWidth > 0)"
    browser.wait_for(loaded)
    assert browser.evaluate("document.images.length") > 30

    shot = Image.open(keep(browser, "gallery.png", tmp_path)).convert("RGB")
    assert shot.size == (1440, 900)
    assert len(shot.getcolors(1 << 24) or []) > 5_000  # pictures, not an empty page
    assert trouble(browser, "preview.html", "data:image/webp") == []


def test_a_click_on_a_rule_leaves_the_samples_it_is_about(browser: Chromium, page: Path):
    browser.open(page)
    click(browser, "[data-facet=rule] [data-value=T101]")
    assert ids(browser) == ["silent"]
    click(browser, "[data-facet=rule] [data-value=T102]")
    assert ids(browser)[:2] == ["silent", "token"]  # rules are alternatives
    click(browser, "[data-facet=rule] [data-value=T101]")
    click(browser, "[data-facet=rule] [data-value=T102]")
    click(browser, "[data-facet=rule] [data-value=clean]")
    click(browser, "[data-facet=file] [data-value='0']")
    assert set(ids(browser)) <= {"clip-0", "clip-1", "clip-2", "clip-3", "chat"}
    assert "Archery" in browser.evaluate(
        "document.querySelector('[data-facet=answer]').textContent"
    )


def test_a_click_on_a_bar_leaves_the_samples_in_it(browser: Chromium, page: Path):
    browser.open(page)
    click(browser, "[data-facet=images] g:last-of-type .hit")
    assert ids(browser) == ["clip-0", "clip-1", "clip-2", "clip-3"]


def test_typing_searches_texts_ids_and_paths(browser: Chromium, page: Path):
    browser.open(page)
    browser.press("/")
    for letter in "bow":
        browser.press(letter)
    browser.wait_for("document.querySelectorAll('.card').length === 1")
    assert ids(browser) == ["chat"]
    browser.press("Escape")
    browser.wait_for("document.querySelectorAll('.card').length === 9")


def test_a_sample_opens_with_its_conversation_and_findings_in_place(
    browser: Chromium, page: Path, tmp_path: Path
):
    browser.open(page)
    click(browser, "[data-facet=rule] [data-value=T101]")
    click(browser, ".card")
    assert browser.evaluate("document.querySelector('#detail').open")
    lines = browser.evaluate(
        "[...document.querySelector('.lines').children].map((e) => [e.className, e.textContent])"
    )
    kinds = [kind for kind, _ in lines]
    assert kinds.index("role") < kinds.index("bubble") < kinds.index("role assistant")
    after_answer = lines[kinds.index("bubble assistant missing") + 1]
    assert after_answer[0] == "finding error"
    assert "T101" in after_answer[1]
    assert browser.evaluate("location.hash").endswith("val.jsonl%3A1")
    keep(browser, "sample.png", tmp_path)
    browser.press("Escape")
    browser.wait_for("!document.querySelector('#detail').open")
    assert trouble(browser, "preview.html", "data:image/webp") == []


def test_several_turns_keep_their_order_roles_and_images(browser: Chromium, page: Path):
    browser.open(page)
    browser.evaluate("open(state.shown.findIndex((s) => s.i === 'chat'))")
    texts = "[...document.querySelectorAll('.bubble')].map((e) => e.textContent)"
    assert browser.evaluate(texts) == ["First?", "A bicycle.", "2nd?", "A bow."]
    assert browser.evaluate("document.querySelectorAll('.film button').length") == 3
    browser.press(".")
    browser.press(".")
    assert browser.evaluate("document.querySelector('.path').textContent") == "clip1.0.jpg"


def test_the_keyboard_moves_opens_and_walks(browser: Chromium, page: Path):
    browser.open(page)
    current = "document.querySelector('.card.current .id').textContent"
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    assert browser.evaluate(current) == "clip-1"
    browser.press("Enter")
    title = "document.querySelector('#detail h3').textContent"
    assert browser.evaluate(title) == "clip-1"
    browser.press("ArrowRight")
    assert browser.evaluate(title) == "clip-2"
    browser.press("n")
    assert browser.evaluate("document.querySelectorAll('.finding').length") > 0


def test_frames_run_under_the_pointer_and_by_the_space_bar(browser: Chromium, page: Path):
    browser.open(page)
    box = browser.evaluate(
        "(() => { const b = document.querySelector('.media.many').getBoundingClientRect();"
        " return [b.x, b.y, b.width]; })()"
    )
    source = "document.querySelector('.media.many .main img').alt"
    browser.move_to(box[0] + 2, box[1] + 40)
    first = browser.evaluate(source)
    browser.move_to(box[0] + box[2] - 3, box[1] + 40)
    assert (first, browser.evaluate(source)) == ("clip0.0.jpg", "clip0.7.jpg")
    browser.press("ArrowRight")
    browser.press("Enter")
    browser.press(" ")
    browser.wait_for("document.querySelector('.path').textContent === 'clip0.3.jpg'")


def test_a_link_to_a_line_opens_its_sample(browser: Chromium, page: Path):
    browser.open(page, f"#{page.parent / 'val.jsonl'}:2".replace("/", "%2F"))
    assert browser.evaluate("document.querySelector('#detail h3').textContent") == "token"


def test_nothing_in_the_data_runs_or_asks_the_network(
    browser: Chromium, page: Path, tmp_path: Path
):
    browser.open(page)
    count = browser.evaluate("samples.length")
    for position in range(count):
        browser.evaluate(f"open({position})")
    browser.evaluate(f"open({count - 2})")
    keep(browser, "attack.png", tmp_path)

    assert ATTACK[:40] in browser.evaluate("document.querySelector('#detail').textContent")
    assert browser.evaluate("window.pwned") is None
    assert (
        browser.evaluate("document.querySelectorAll('iframe, #detail script, #detail a').length")
        == 0
    )
    assert trouble(browser, "preview.html", "data:image/webp") == []


def test_the_policy_stops_what_gets_in_nevertheless(browser: Chromium, page: Path):
    browser.open(page)
    refused = browser.evaluate(
        "['body.innerHTML = `<p>x</p>`', 'body.setAttribute(`onclick`, `x`)'].map((code) => {"
        " const { body } = document;"
        " try {"
        "   if (code.includes('innerHTML')) body.innerHTML = '<p>x</p>';"
        "   else body.setAttribute('onclick', 'window.pwned = 1');"
        "   return false;"
        " } catch (error) { return error instanceof TypeError; } })"
    )
    loaded = browser.evaluate("fetch('https://example.com/').then(() => true, () => false)")
    browser.evaluate(
        "(() => { const s = document.createElement('style'); s.textContent = 'body { opacity: 0 }';"
        " document.body.append(s); })()"
    )

    assert refused == [True, True]
    assert loaded is False
    assert browser.evaluate("getComputedStyle(document.body).opacity") == "1"


def test_the_dark_theme_is_dark(page: Path, tmp_path: Path):
    with Chromium(tmp_path, dark=True) as browser:
        browser.open(page)
        shot = Image.open(keep(browser, "dark.png", tmp_path)).convert("L")
    assert shot.getpixel((720, 80)) < 60  # pyright: ignore[reportOperatorIssue]


@pytest.mark.slow
@pytest.mark.long
def test_ten_thousand_samples_stay_small_and_quick(
    browser: Chromium, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
):
    root = tmp_path_factory.mktemp("many")
    for number in range(200):
        photo(root / "images" / f"{number}.jpg", number)
    for number in range(20_000):  # distinct files of the same pictures: links would not do
        shutil.copy(root / "images" / f"{number % 200}.jpg", root / "images" / f"x{number}.jpg")
    samples = [
        sample(
            f"s-{i}",
            *(f"x{2 * i}.jpg", f"x{2 * i + 1}.jpg"),
            user=f"What is it, {i}? " + "word " * 40,
            answer=f"class {i % 30}" if i % 100 else " ",
        )
        for i in range(10_000)
    ]
    write_samples(root / "train.jsonl", samples)
    result = write_preview([root / "train.jsonl"], root / "preview.html")
    assert result.num_samples == 10_000
    assert result.num_images >= 10_000
    assert result.num_bytes < 50e6

    browser.open(root / "preview.html")
    nodes = "document.querySelectorAll('*').length"
    assert browser.evaluate(nodes) < 1500
    for part in (0.3, 0.9):
        browser.evaluate(f"byId('scroll').scrollTop = byId('scroll').scrollHeight * {part}")
        browser.wait_for("document.querySelector('.card .id').textContent !== 's-0'")
        assert browser.evaluate(nodes) < 1500
    keep(browser, "ten-thousand.png", tmp_path)
    click(browser, "[data-facet=rule] [data-value=T101]")
    assert ids(browser)[:3] == ["s-0", "s-100", "s-200"]
    milliseconds = browser.evaluate(
        "(() => { const t = performance.now(); search('it, 77'); refresh();"
        " document.body.getBoundingClientRect(); return performance.now() - t; })()"
    )
    assert milliseconds < 1000  # about 30 where nothing else runs
