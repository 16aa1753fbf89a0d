"""The report of a run in a browser: headless Chromium, see `tests/data/chromium.py`."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from phi3v_train.report import write_report
from PIL import Image

from tests.data.chromium import PROGRAM, Chromium, keep_screenshot, trouble
from tests.train.run_folders import ATTACK, log_line, make_eval_shards, predictions, write_run

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(PROGRAM is None, reason="needs Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with curves, answers right and wrong, and an attack in everything."""
    root = tmp_path_factory.mktemp("report")
    answers = predictions(30, wrong=[1, 5, 9])
    answers[3] = replace(answers[3], prediction=ATTACK, correct=False, score=0.0)
    run = write_run(
        root / "first",
        shards=make_eval_shards(root, 30),
        lines=[log_line(step) for step in range(1, 101)],
        history=[{"step": step, "loss": 1.5, "accuracy": step / 100} for step in (20, 60, 100)],
        evaluations={"before": predictions(30, wrong=range(20)), "after": answers},
        attempts=[{"started": ATTACK, "start_step": 0, "packages": {ATTACK: ATTACK}}],
    )
    return write_report(run).path


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chromium]:
    with Chromium(tmp_path) as chromium:
        yield chromium


def keep(browser: Chromium, name: str, tmp_path: Path) -> Image.Image:
    """Take a screenshot; `REPORT_SCREENSHOTS` is a folder to keep it in."""
    file = keep_screenshot(browser, tmp_path / name, "REPORT_SCREENSHOTS")
    return Image.open(file).convert("RGB")


def shown_cards(browser: Chromium) -> list[int]:
    """[all, right, wrong] cards that can be seen."""
    return browser.evaluate(
        "['', '.right', '.wrong'].map((kind) => [...document.querySelectorAll('.card' + kind)]"
        ".filter((card) => card.offsetParent).length)"
    )


def test_curves_and_pictures_are_drawn(browser: Chromium, page: Path, tmp_path: Path) -> None:
    browser.open(page)
    browser.wait_for("[...document.images].every((i) => i.complete)")
    assert browser.evaluate("[...document.images].filter((i) => !i.naturalWidth).length") == 0
    assert browser.evaluate("document.querySelectorAll('.curve img').length") == 9
    assert browser.evaluate("document.querySelectorAll('.card img').length") == 60
    shot = keep(browser, "top.png", tmp_path)
    line = (79, 70, 229)
    assert sum(count for count, color in shot.getcolors(1 << 24) or [] if color == line) > 200
    browser.evaluate("document.querySelector('.cards').scrollIntoView()")
    gallery = keep(browser, "answers.png", tmp_path)
    assert len(gallery.getcolors(1 << 24) or []) > 5_000  # pictures, not an empty page
    browser.evaluate("document.querySelector('.matrix').scrollIntoView({ block: 'center' })")
    keep(browser, "matrix.png", tmp_path)
    assert trouble(browser, "report.html", "data:image/") == []


def test_a_click_leaves_the_wrong_answers_without_any_script(browser: Chromium, page: Path) -> None:
    browser.open(page)
    assert shown_cards(browser) == [30, 26, 4]
    for kind, left in (("wrong", [4, 0, 4]), ("right", [26, 26, 0]), ("all", [30, 26, 4])):
        box = browser.evaluate(
            f"(() => {{ const e = document.querySelector('label[for=show-{kind}]');"
            " e.scrollIntoView({ block: 'center' }); const b = e.getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for event in ("mousePressed", "mouseReleased"):
            details = {"type": event, "x": box[0], "y": box[1], "button": "left", "clickCount": 1}
            browser.call("Input.dispatchMouseEvent", details)
        assert shown_cards(browser) == left


def test_the_confusion_matrix_names_classes_and_counts(browser: Chromium, page: Path) -> None:
    browser.open(page)
    rows = browser.evaluate(
        "[...document.querySelectorAll('.matrix tbody tr')].map((row) =>"
        " [...row.children].map((cell) => cell.textContent))"
    )
    assert rows == [
        ["archery", "8", "", "", "2"],
        ["biking", "", "9", "", "1"],
        ["diving", "", "", "9", "1"],
    ]
    header = browser.evaluate(
        "(() => { const b = document.querySelector('.matrix thead th').getBoundingClientRect();"
        " return b.height > b.width; })()"
    )
    assert header is True  # the names of columns stand upright


def test_nothing_in_the_data_runs_or_asks_the_network(browser: Chromium, page: Path) -> None:
    browser.open(page)
    browser.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert ATTACK[:40] in browser.evaluate("document.body.textContent")
    assert browser.evaluate("window.pwned") is None
    assert browser.evaluate("document.querySelectorAll('script, iframe, svg, a').length") == 0
    assert browser.evaluate("getComputedStyle(document.body).display") == "block"
    refused = browser.evaluate(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
        " document.body.append(s); return window.ran === undefined; })()"
    )
    assert refused is True
    assert browser.evaluate("fetch('https://example.com/').then(() => true, () => false)") is False


def test_the_dark_theme_is_dark_and_so_are_its_curves(page: Path, tmp_path: Path) -> None:
    with Chromium(tmp_path, dark=True) as browser:
        browser.open(page)
        browser.wait_for("[...document.images].every((i) => i.complete)")
        shot = keep(browser, "dark.png", tmp_path)
    assert max(shot.getpixel((20, 400))) < 60  # pyright: ignore[reportArgumentType]
    line = (157, 151, 255)
    assert sum(count for count, color in shot.getcolors(1 << 24) or [] if color == line) > 200


def test_on_a_narrow_screen_nothing_is_wider_than_the_page(page: Path, tmp_path: Path) -> None:
    with Chromium(tmp_path, width=420) as browser:
        browser.open(page)
        width = browser.evaluate("document.documentElement.scrollWidth")
    assert width <= 420
